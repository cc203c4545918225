"""What makes a pair usable, whatever its format: its turns, and texts that are not rendered already."""

from __future__ import annotations

import re

from bdpo.data.formats.base import BadRow, Pair
from bdpo.data.formats.stringified import is_stringified
from bdpo.data.formats.transcript import is_transcript
from bdpo.models.template import GUARD

# The control tokens of the chat templates of Llama 2 to 4, Mistral, Qwen, Gemma, Phi, Command-R, DeepSeek,
# gpt-oss, Zephyr and Nemotron. A text that holds one was rendered before, or forges a turn.
_TEMPLATE_TOKEN = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|end_header_id|header_start|header_end|begin_of_text|eot_id|eot"
    r"|system|user|assistant|end|endoftext|start|message|channel|START_OF_TURN_TOKEN|END_OF_TURN_TOKEN)\|>"
    r"|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|<extra_id_1>|<｜(?:User|Assistant|end▁of▁sentence)｜>"
)

# What a prompt ends with that was rendered as Vicuna's or Alpaca's template writes it, in words alone.
_ANSWER_HEADERS = ("ASSISTANT:", "### Response:", "### Assistant:")

_CHATML = re.compile(r"\s*<\|im_start\|>|.*<\|im_end\|>\s*\Z", re.DOTALL)


def check_pair(pair: Pair) -> None:
    """Make sure that the pair is a conversation that a user ends, with two different answers.

    Raises:
        BadRow: it is not, or one of its texts is a rendered conversation, a transcript or a list.
    """
    if not any(m["role"] == "user" and m["content"].strip() for m in pair.prompt):
        raise BadRow("prompt: no user turn with text")
    if pair.prompt[-1]["role"] not in ("user", "tool"):
        raise BadRow("prompt: does not end with a user turn")
    for side, message in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not message["content"].strip() and message.keys() <= {"role", "content"}:
            raise BadRow(f"{side}: empty")
        _check_text(message["content"], side)
        if message["content"].rstrip().endswith("</s>") and "<s>" not in message["content"]:
            raise BadRow(f"{side}: ends with </s>, the end of a rendered answer; give the text without it")
    if pair.chosen == pair.rejected:
        raise BadRow("chosen equals rejected")
    for message in pair.prompt:
        _check_text(message["content"], "prompt")
    if pair.prompt[-1]["content"].rstrip().endswith(_ANSWER_HEADERS):
        raise BadRow(
            "prompt: ends where an answer begins, as a rendered one does; give the messages themselves"
        )
    if is_transcript(pair.prompt[0]["content"]):
        raise BadRow("prompt: a transcript of Human: and Assistant:; set data.format=hh_rlhf")


def _check_text(text: str, column: str) -> None:
    if GUARD in text:  # it would be taken out again
        raise BadRow(f"{column}: holds the noncharacters U+FDD0 and U+FDD1")
    if ("<" in text or "[" in text) and _TEMPLATE_TOKEN.search(text):
        remedy = "set data.format=chatml" if _CHATML.match(text) else "give the messages themselves"
        raise BadRow(f"{column}: holds control tokens of a chat template; {remedy}")
    if text.startswith("[") and is_stringified(text):
        raise BadRow(f"{column}: the text of a list of messages; set data.format=stringified")
