"""PKU-SafeRLHF in all its versions (also 30K and single-dimension), and the preferences of BeaverTails."""

from __future__ import annotations

from bdpo.data.formats.base import (
    Excluded,
    Format,
    Pair,
    Row,
    answer,
    boolean_cell,
    has_columns,
    id_cell,
    question,
    text_cell,
)

_SAFE = ("is_response_0_safe", "is_response_1_safe")


def read(row: Row) -> Pair:
    """Two responses, each labelled safe or not. The query itself has no label.

    Exactly one response safe: an unsafe query, the safe response is chosen. Both safe: a safe query,
    `better_response_id` is chosen. A version without the labels: `better_response_id` is chosen, and the
    group is unknown. An id that is given is 0 or 1, even where the labels decide.

    Raises:
        BadRow: a cell is malformed.
        Excluded: both responses are unsafe, so there is nothing to prefer.
    """
    prompt = [question(text_cell(row, "prompt"))]
    responses = [text_cell(row, "response_0"), text_cell(row, "response_1")]
    if row.keys().isdisjoint(_SAFE):
        better = id_cell(row, "better_response_id")
        return Pair(prompt, answer(responses[better]), answer(responses[1 - better]))
    safe = [boolean_cell(row, column) for column in _SAFE]
    if row.get("better_response_id") is not None:
        id_cell(row, "better_response_id")  # a value that is no id is refused even where the labels decide
    if not any(safe):
        raise Excluded("both responses unsafe")
    better = id_cell(row, "better_response_id") if all(safe) else safe.index(True)
    return Pair(
        prompt,
        answer(responses[better]),
        answer(responses[1 - better]),
        group="safe" if all(safe) else "unsafe",
        chosen_safe=safe[better],
        rejected_safe=safe[1 - better],
    )


FORMAT = Format(
    name="pku_saferlhf",
    read=read,
    fits=has_columns("prompt", "response_0", "response_1", "better_response_id"),
    columns=("prompt", "response_0", "response_1", "better_response_id", *_SAFE),
    expects="prompt,response_0,response_1,better_response_id, with is_response_0_safe,is_response_1_safe",
)
