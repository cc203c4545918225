"""TRL's preference format with an implicit prompt in plain texts.

A format of its own, so that a row of the explicit format that has lost its prompt is bad instead of being
cut somewhere.
"""

from __future__ import annotations

from os.path import commonprefix

from bdpo.data.formats.base import BadRow, Format, Pair, Row, answer, question, text_cell
from bdpo.data.formats.transcript import begins_with_speaker


def read(row: Row) -> Pair:
    """What both texts begin with is the prompt; as TRL's `extract_prompt`, but cut between words.

    The space or the line breaks between prompt and answers belong to neither.
    """
    chosen, rejected = text_cell(row, "chosen"), text_cell(row, "rejected")
    shared = commonprefix([chosen, rejected])
    if shared and any(_in_a_word(text, len(shared)) for text in (chosen, rejected)):
        shared = shared.removesuffix(shared.rsplit(maxsplit=1)[-1])
    if not shared.strip():
        raise BadRow("prompt: chosen and rejected have no first word in common")
    return Pair(
        [question(shared.rstrip())],
        answer(chosen[len(shared) :].lstrip()),
        answer(rejected[len(shared) :].lstrip()),
    )


def _in_a_word(text: str, index: int) -> bool:
    """Whether a word of the text goes on across this place."""
    return not (text[index - 1 : index].isspace() or text[index : index + 1].isspace() or index == len(text))


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
