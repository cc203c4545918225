"""TRL's preference format with an implicit prompt in plain texts.

A format of its own, so that a row of the explicit format that has lost its prompt is bad instead of being
cut somewhere.
"""

from __future__ import annotations

import re
from itertools import takewhile

from bdpo.data.formats.base import BadRow, Format, Pair, Row, answer, question, text_cell
from bdpo.data.formats.transcript import begins_with_speaker

_BETWEEN_WORDS = re.compile(r"(?<=\S)(?=\s)")


def read(row: Row) -> Pair:
    """What both texts begin with is the prompt; as TRL's `extract_prompt`, but cut between words.

    The space or the line breaks between prompt and answers belong to neither.
    """
    chosen, rejected = text_cell(row, "chosen"), text_cell(row, "rejected")
    words = zip(_BETWEEN_WORDS.split(chosen), _BETWEEN_WORDS.split(rejected), strict=False)
    shared = "".join(first for first, _ in takewhile(lambda pair: pair[0] == pair[1], words))
    if not shared.strip():
        raise BadRow("prompt: chosen and rejected have no first word in common")
    return Pair(
        [question(shared)],
        answer(chosen[len(shared) :].lstrip()),
        answer(rejected[len(shared) :].lstrip()),
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
