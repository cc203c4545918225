"""TRL's preference format with an implicit prompt in plain texts.

A format of its own, so that a row of the explicit format that has lost its prompt is bad instead of being
cut somewhere.
"""

from __future__ import annotations

from itertools import takewhile

from bdpo.data.formats.base import BadRow, Format, Pair, Row, answer, question, text_cell
from bdpo.data.formats.transcript import begins_with_speaker


def read(row: Row) -> Pair:
    """What both texts begin with is the prompt; as in TRL's `extract_prompt`, it is cut between words."""
    chosen, rejected = text_cell(row, "chosen").split(" "), text_cell(row, "rejected").split(" ")
    shared = sum(
        1 for _ in takewhile(lambda words: words[0] == words[1], zip(chosen, rejected, strict=False))
    )
    if not shared:
        raise BadRow("prompt: chosen and rejected have no first word in common")
    return Pair(
        [question(" ".join(chosen[:shared]))],
        answer(" ".join(chosen[shared:])),
        answer(" ".join(rejected[shared:])),
    )


def _fits(row: Row) -> bool:
    texts = row.keys() == {"chosen", "rejected"} and isinstance(row["chosen"], str)
    return texts and not begins_with_speaker(row["chosen"])


FORMAT = Format(
    name="preference_text",
    read=read,
    fits=_fits,
    columns=("chosen", "rejected"),
    expects="chosen,rejected as texts that begin with the prompt",
)
