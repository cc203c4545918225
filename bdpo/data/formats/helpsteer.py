"""HelpSteer's preferences: two responses, and a number: which is better, and by how much."""

from __future__ import annotations

from bdpo.data.formats.base import Excluded, Format, Pair, Row, answer, number_cell, text_cell
from bdpo.data.formats.messages import prompt_cell

# Names of HelpSteer 3, then of HelpSteer 2.
_NAMES = (
    ("context", "response1", "response2", "overall_preference"),
    ("prompt", "response_1", "response_2", "preference_strength"),
)


def read(row: Row) -> Pair:
    """Below 0 the first response is better, above 0 the second.

    Raises:
        Excluded: 0, neither is better.
    """
    prompt, first, second, strength = _NAMES[0] if "context" in row else _NAMES[1]
    better = number_cell(row, strength)
    responses = [answer(text_cell(row, first)), answer(text_cell(row, second))]
    if better == 0:
        raise Excluded("neither response is preferred")
    if better > 0:
        responses.reverse()
    return Pair(prompt_cell(row, prompt), chosen=responses[0], rejected=responses[1])


FORMAT = Format(
    name="helpsteer",
    read=read,
    fits=lambda row: any(row.keys() >= set(names) for names in _NAMES),
    columns=tuple(name for names in _NAMES for name in names),
    expects="context,response1,response2,overall_preference or "
    "prompt,response_1,response_2,preference_strength",
)
