"""Anthropic's HH-RLHF: transcripts of `Human:` and `Assistant:`, in all its folders and their copies."""

from __future__ import annotations

from bdpo.data.formats.base import BadRow, Format, Pair, Row, answer, question, text_cell
from bdpo.data.formats.messages import split_conversations
from bdpo.data.formats.transcript import begins_with_speaker, is_transcript, read_transcript
from bdpo.models.template import Message


def read(row: Row) -> Pair:
    """Two transcripts that share all but the last turn; or a transcript as `prompt` and two answers.

    A `prompt` ends with `Assistant:`, and the responses are what follows, as the static copies have it. A
    `prompt` beside two whole transcripts, as a transcript or as plain text, repeats what these begin with.

    Raises:
        BadRow: the transcripts do not fit together, or begin with something else than the prompt.
    """
    whole = all(is_transcript(row.get(side)) for side in ("chosen", "rejected"))
    if row.get("prompt") is None or whole:
        pair = Pair(*split_conversations(read_transcript(row, "chosen"), read_transcript(row, "rejected")))
        if row.get("prompt") is not None and _repeated(row) != pair.prompt:
            raise BadRow("prompt: differs from what chosen and rejected begin with")
        return pair
    prompt = prompt_of_transcript(row, "prompt")
    return Pair(prompt, answer(text_cell(row, "chosen").strip()), answer(text_cell(row, "rejected").strip()))


def _repeated(row: Row) -> list[Message]:
    if begins_with_speaker(row["prompt"]):
        return prompt_of_transcript(row, "prompt")
    return [question(text_cell(row, "prompt").strip())]


def prompt_of_transcript(row: Row, column: str) -> list[Message]:
    """The turns of a prompt; the name of the assistant at its end is not one.

    Raises:
        BadRow: it is no transcript, or ends with words of the assistant.
    """
    turns = read_transcript(row, column)
    if turns[-1]["role"] == "assistant" and turns.pop()["content"]:
        raise BadRow(f"{column}: ends with an answer of the assistant")
    return turns


def _fits(row: Row) -> bool:
    if not {"chosen", "rejected"} <= row.keys():
        return False
    if row.get("prompt") is not None:
        return is_transcript(row["prompt"])
    return begins_with_speaker(row["chosen"])


FORMAT = Format(
    name="hh_rlhf",
    read=read,
    fits=_fits,
    columns=("prompt", "chosen", "rejected"),
    expects="chosen,rejected as transcripts of Human: and Assistant:",
)
