"""What makes a pair usable, whatever its format: its turns, and texts that are not rendered already."""

from __future__ import annotations

import re

from bdpo.data.formats.base import BadRow, Pair
from bdpo.data.formats.messages import MEANINGFUL_KEYS
from bdpo.data.formats.stringified import is_stringified, is_stringified_otherwise
from bdpo.data.formats.transcript import (
    begins_with_assistant,
    ends_with_assistant,
    holds_question,
    is_other_transcript,
    is_question_of_transcript,
    is_transcript,
)
from bdpo.models.template import GUARD, Message

TEMPLATED = "already templated: holds control tokens of a chat template"
"""The reason against a text that a template has written; `bdpo.data.rendering` asks the model's own."""

# The control tokens of published chat templates, whatever the model. A text with one was rendered before, or
# forges a turn. Of the form `<|word|>` are those of Llama 3 and 4, Qwen, Phi, Command-R, gpt-oss, Zephyr,
# Granite, GLM, Kimi, LFM2, OLMo; published answers have thoughts and solutions between such marks, too.
_TEMPLATE_TOKEN = re.compile(
    r"<\|(?!\w*(?i:think|thought|solution))(?:[A-Za-z]\w{3,}|end|eot|eom)\|>"
    r"|<\|(?:turn|channel|tool)>|<(?:turn|channel|tool)\|>|\[\|(?:system|user|assistant|endofturn)\|\]"
    r"|</s><s>|<eos><bos>|\A\s*(?:<bos>|<s>(?!.*</s>))|<(?:BOS|EOS|EOP)_TOKEN>|<seed:[be]os>|\[gMASK\]"
    r"|<(?:start|end)_of_turn>|<(?:beginning|end)_of_sentence>|<extra_id_1>|<｜(?![^｜]*think)[\w▁]+｜>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|<</?SYS>>",
    re.DOTALL,
)

_ENDS = ("</s>", "<eos>")

# Anything but spaces, control characters, and what is drawn as nothing: the characters of Unicode's property
# Default_Ignorable_Code_Point, the blank pattern of Braille, and the marks of interlinear annotations.
_VISIBLE = re.compile(
    r"[^\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3"
    r"\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)

# So long a question is not repeated by chance at the beginning of both answers; a greeting is.
_LONGER_THAN_A_GREETING = 20

_CHATML = re.compile(r"\s*<\|im_start\|>|.*<\|im_end\|>\s*\Z", re.DOTALL)


def check_pair(pair: Pair) -> None:
    """Make sure that the pair is a conversation that a user ends, with two different answers.

    Raises:
        BadRow: it is not, or one of its texts is a rendered conversation, a transcript or a list.
    """
    if not any(m["role"] == "user" and _VISIBLE.search(m["content"]) for m in pair.prompt):
        raise BadRow("prompt: no user turn with text")
    if pair.prompt[-1]["role"] not in ("user", "tool"):
        raise BadRow("prompt: does not end with a user turn")
    for side, message in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if _is_empty(message):
            raise BadRow(f"{side}: {'invisible characters alone' if message['content'].strip() else 'empty'}")
        _check_text(message["content"], side)
        _check_answer(message["content"], f"{side}:")
    if pair.chosen == pair.rejected:
        raise BadRow("chosen equals rejected")
    for message in pair.prompt:
        if message["role"] in ("user", "assistant") and _is_empty(message):
            raise BadRow(f"prompt: a turn of the {message['role']} without text")
        _check_text(message["content"], "prompt")
        if message["role"] == "user":
            _check_question(message["content"])
        elif message["role"] == "assistant":
            _check_answer(message["content"], "prompt: an earlier answer")
    _check_not_repeated(pair)


def _is_empty(message: Message) -> bool:
    """Whether a message has no text that can be seen, and no tool call or other key of `MEANINGFUL_KEYS`."""
    return not _VISIBLE.search(message["content"]) and MEANINGFUL_KEYS.isdisjoint(message)


def _check_not_repeated(pair: Pair) -> None:
    """One answer may parrot its question; if both do, they are texts of the complete conversation."""
    question = pair.prompt[-1]["content"].strip()
    if len(question) > _LONGER_THAN_A_GREETING and all(
        message["content"].lstrip().startswith(question) for message in (pair.chosen, pair.rejected)
    ):
        raise BadRow(
            "chosen and rejected: begin with the prompt; give the answers alone, or set "
            "data.format=preference_text"
        )


def _check_question(text: str) -> None:
    """Make sure that a turn of the user is one; it may end with `</s>`, of which it may ask."""
    if is_transcript(text) or is_question_of_transcript(text):
        raise BadRow("prompt: a transcript of Human: and Assistant:; set data.format=hh_rlhf")
    if ends_with_assistant(text):
        raise BadRow(
            "prompt: ends where an answer begins, as a rendered one does; give the messages themselves"
        )
    if is_other_transcript(text):
        raise BadRow("prompt: a transcript of two speakers; give the messages themselves")
    if begins_with_assistant(text):
        raise BadRow("prompt: begins with the name of the assistant; give the messages themselves")


def _check_answer(text: str, place: str) -> None:
    """Make sure that an answer is one, and not rendered; `place` begins the reason."""
    for end in _ENDS:
        if text.rstrip().endswith(end) and "<s>" not in text:
            raise BadRow(f"{place} ends with {end}, the end of a rendered answer; give the text without it")
    if is_transcript(text):
        raise BadRow(
            f"{place} holds turns of Human: and Assistant:; give the answer alone, "
            "or two whole transcripts with data.format=hh_rlhf"
        )
    if holds_question(text):
        raise BadRow(f"{place} holds a turn of the user; give the answer alone")
    if is_other_transcript(text):
        raise BadRow(f"{place} is a transcript of two speakers; give the answer alone")
    if begins_with_assistant(text):
        raise BadRow(f"{place} begins with the name of a speaker; give the text without it")


def _check_text(text: str, column: str) -> None:
    if GUARD in text:  # it would be taken out again
        raise BadRow(f"{column}: holds the noncharacters U+FDD0 and U+FDD1")
    if ("<" in text or "[" in text) and _TEMPLATE_TOKEN.search(text):
        remedy = "set data.format=chatml" if _CHATML.match(text) else "give the messages themselves"
        raise BadRow(f"{column}: {TEMPLATED}; {remedy}")
    if is_stringified(text):
        raise BadRow(f"{column}: the text of a list of messages, or of one; set data.format=stringified")
    if is_stringified_otherwise(text):
        raise BadRow(f"{column}: the text of a list of messages, or of one; give the messages themselves")
