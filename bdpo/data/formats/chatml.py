"""Texts that were already rendered with a ChatML template: the conversation is read back from them."""

from __future__ import annotations

import re

from bdpo.data.formats.base import BadRow, Format, Pair, Row, answer, text_cell
from bdpo.data.formats.messages import ROLES, split_conversations
from bdpo.models.template import Message

_START, _END = "<|im_start|>", "<|im_end|>"

_HEADER = f"{_START}assistant"

_TURN = re.compile(re.escape(_START) + r"(\w+)(?:\n|\Z)(.*?)(?:" + re.escape(_END) + r"\s*|\Z)", re.DOTALL)


def read(row: Row) -> Pair:
    """A `prompt` that ends with the assistant's header, and two answers; or two whole conversations."""
    if row.get("prompt") is None:
        return Pair(*split_conversations(_turns(row, "chosen"), _turns(row, "rejected")))
    prompt = _turns(row, "prompt")
    if prompt[-1]["role"] == "assistant" and not prompt[-1]["content"]:
        prompt.pop()
    newline = "\n" if row["prompt"].endswith(_HEADER) else ""  # of the header, where the prompt lacks it
    return Pair(prompt, _response(row, "chosen", newline), _response(row, "rejected", newline))


def _turns(row: Row, column: str) -> list[Message]:
    text = text_cell(row, column).lstrip()
    messages, end = [], 0
    for turn in _TURN.finditer(text):
        if turn.start() != end or turn[1] not in ROLES:
            break
        messages.append(Message(role=turn[1], content=turn[2]))
        end = turn.end()
    if not messages or end != len(text):
        raise BadRow(f"{column}: not a conversation in ChatML")
    return messages


def _response(row: Row, column: str, newline: str) -> Message:
    """The answer without the end of its turn and what follows that; nothing inside the answer is trimmed."""
    text = text_cell(row, column).removeprefix(newline)
    if (whole := text.rstrip()).endswith(_END):
        text = whole.removesuffix(_END)
    if _START in text or _END in text:
        raise BadRow(f"{column}: not exactly one answer in ChatML")
    return answer(text)


FORMAT = Format(
    name="chatml",
    read=read,
    fits=lambda row: False,  # set explicitly, where a row of another format was refused for being rendered
    columns=("prompt", "chosen", "rejected"),
    expects="prompt,chosen,rejected as texts in ChatML",
)
