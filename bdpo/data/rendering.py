"""Pairs -> what the chat template writes -> token ids, many at a time.

Most pairs are texts alone. Where a message or a row holds more (tools, tool calls, reasoning, arguments of
the template), the template is asked whether it writes that: a template drops what it does not know without
a word, and then the row would mean something else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from jinja2 import TemplateError

from bdpo.config import DataConfig
from bdpo.data.checks import TEMPLATED
from bdpo.data.containers import shown_name
from bdpo.data.formats.base import BadRow, LeftOut, Pair
from bdpo.data.formats.messages import MEANINGFUL_KEYS
from bdpo.models.template import GUARD, PLAIN, PROBE, Message
from bdpo.models.tokenizer import ChatTokenizer, EncodedPair

_SPEAKERS = {"user", "assistant"}


@dataclass(frozen=True)
class Rendered:
    """A pair as the template writes it; both responses without the end of the turn."""

    prompt: str
    chosen: str
    rejected: str
    written: Pair  # without the message keys that the template does not write
    unwritten: set[str]  # the names of those
    changed: bool  # whether a text is written in part or in other words, beyond trimming at both ends


def encode_pairs(
    chat: ChatTokenizer, pairs: Sequence[Pair], data: DataConfig
) -> list[tuple[EncodedPair, Rendered] | BadRow]:
    """Token ids of each pair and what they are of, or why it cannot be used.

    A response is cut on the right to what `max_length` leaves; a cut one has no end-of-turn token.
    """
    rendered = [_render_or_reason(chat, pair) for pair in pairs]
    sound = [one for one in rendered if isinstance(one, Rendered)]
    prompts = iter(chat.ids_of_texts([one.prompt for one in sound]))
    answers = [text for one in sound for text in (one.chosen, one.rejected)]
    ids = iter(chat.ids_of_answers(answers))
    return [
        one
        if isinstance(one, BadRow)
        else _within_lengths(chat, (next(prompts), next(ids), next(ids)), data, one)
        for one in rendered
    ]


def _within_lengths(
    chat: ChatTokenizer,
    found: tuple[list[int], list[int] | None, list[int] | None],
    data: DataConfig,
    rendered: Rendered,
) -> tuple[EncodedPair, Rendered] | BadRow:
    """The ids of prompt, chosen and rejected, both without the end of the turn, within their lengths."""
    prompt, chosen, rejected = found
    if chosen is None or rejected is None:
        side = "chosen" if chosen is None else "rejected"
        return BadRow(f"{side}: its tokens merge with those that the chat template writes beside it")
    ids = EncodedPair(prompt, chosen, rejected)
    if len(ids.prompt) > data.max_prompt_length:
        return LeftOut("prompt: longer than max_prompt_length")
    if ids.chosen == ids.rejected:
        return BadRow("chosen equals rejected as the chat template writes them")
    room = data.max_length - len(ids.prompt)
    chosen, rejected = ([*side, chat.end_of_turn_id][:room] for side in (ids.chosen, ids.rejected))
    if chosen == rejected:
        return LeftOut("chosen equals rejected within max_length")
    return EncodedPair(ids.prompt, chosen, rejected), rendered


def _render_or_reason(chat: ChatTokenizer, pair: Pair) -> Rendered | BadRow:
    try:
        return render_pair(chat, pair)
    except BadRow as reason:
        return reason
    except TemplateError:
        return BadRow("prompt: refused by the chat template")


def render_pair(chat: ChatTokenizer, pair: Pair) -> Rendered:
    """The pair as the template writes it.

    Raises:
        BadRow: the template does not write something that changes what the row means.
        jinja2.TemplateError: it refuses the conversation.
    """
    return _Rendering(chat, pair).rendered()


def arguments_of(pair: Pair) -> Mapping[str, Any]:
    """What the renderings of a pair get beside the variables of all pairs: its tools and its variables."""
    return dict(pair.template_kwargs) | ({"tools": pair.tools} if pair.tools else {})


class _Rendering:
    """One pair behind the template, which is asked what it writes."""

    def __init__(self, chat: ChatTokenizer, pair: Pair) -> None:
        self.template = chat.template
        self.pair = pair
        self.messages = (*pair.prompt, pair.chosen, pair.rejected)
        self.is_plain = all(message.keys() == PLAIN for message in self.messages)
        self._refuse_control_tokens()
        if not pair.template_kwargs.keys() <= self.template.free_variables:
            raise BadRow("chat_template_kwargs: holds an argument that the chat template does not read")
        self.arguments = arguments_of(pair)
        self.roles = tuple(message["role"] for message in pair.prompt)
        self.texts = [self.template.guarded(message["content"]).strip() for message in pair.prompt]
        self._joined_texts = "\n".join(self.texts)
        self.prompt = self._render(pair.prompt)
        self.unwritten: set[str] = set()

    def _render(self, turns: list[Message], generate: bool = True) -> str:
        return self.template.render(turns, generate, self.arguments)

    def rendered(self) -> Rendered:
        """The pair, after the template was asked of everything that is not plain text."""
        if self.pair.tools:
            without = self.template.render(self.pair.prompt, True, {**self.arguments, "tools": None})
            if without == self.prompt:
                raise BadRow("tools: not written by the chat template")
        prompt: list[Message] = list(self.pair.prompt)
        for index, (role, message) in enumerate(zip(self.roles, self.pair.prompt, strict=True)):
            self._check_turn(index, message)
            if role not in _SPEAKERS and (other := self.template.written_as(self.roles, index)):
                raise BadRow(f"prompt: a {role} turn, which the chat template writes as the {other}'s")
            for key in sorted(message.keys() - PLAIN):
                turns = _without(prompt, index, key)
                if not self._is_written("prompt", key, self.prompt, self._render(turns)):
                    prompt = turns
        chosen, chosen_message = self._response("chosen")
        rejected, rejected_message = self._response("rejected")
        is_whole = self._writes(self.pair.chosen, chosen) and self._writes(self.pair.rejected, rejected)
        changed = not is_whole or self._changes_prompt()
        written = self.pair
        if self.unwritten:
            written = replace(written, prompt=prompt, chosen=chosen_message, rejected=rejected_message)
        return Rendered(self.prompt, chosen, rejected, written, self.unwritten, changed)

    def _writes(self, message: Message, response: str) -> bool:
        """Whether the text of a response is what stands there; beside it may be tool calls or thoughts."""
        text = self.template.guarded(message["content"]).strip()
        return text in response if message.keys() - PLAIN else text == response.strip()

    def _changes_prompt(self) -> bool:
        """Whether a turn is not found as it is: one behind the other, a system turn in any place."""
        position = 0
        for role, text in zip(self.roles, self.texts, strict=True):
            found = self.prompt.find(text, 0 if role == "system" else position)
            if found < 0:
                return True
            if role != "system":
                position = found + len(text)
        return False

    def _check_turn(self, index: int, message: Message) -> None:
        """Make sure that a turn is in what the template writes; it may write one in part alone.

        Some write the tool calls of an assistant without the text beside them.
        """
        if not self.texts[index] or self._is_seen(index):
            return
        if message["role"] == "assistant" and not MEANINGFUL_KEYS.isdisjoint(message):
            return
        turns = list(self.pair.prompt)
        turns[index] = {**message, "content": PROBE}
        if self._render(turns) == self.prompt:
            article = "an" if message["role"] == "assistant" else "a"
            raise BadRow(f"prompt: {article} {message['role']} turn is not written by the chat template")

    def _is_seen(self, index: int) -> bool:
        """Whether the text of a turn is in the prompt and cannot be there for another reason.

        Another turn may hold the same text, and the template may write it itself; its tools and variables may
        decide which turns it writes.
        """
        text = self.texts[index]
        return (
            text in self.prompt
            and not self.arguments
            and self.template.writes_turn(self.roles, index)
            and self._joined_texts.count(text) == 1
        )

    def _is_written(self, column: str, key: str, text: str, without: str) -> bool:
        """Whether a text has something of a key; the account names one of which it has nothing.

        Raises:
            BadRow: it has nothing of a key that means something.
        """
        if text != without:
            return True
        if key in MEANINGFUL_KEYS:
            raise BadRow(f"{column}: {key} is not written by the chat template")
        self.unwritten.add(f"{column}[].{shown_name(key)}")
        return False

    def _response(self, side: Literal["chosen", "rejected"]) -> tuple[str, Message]:
        """A response as the template writes it behind this prompt, and its message without unwritten keys.

        Of every row the template writes the complete conversation: a system turn, or a word in the question,
        may decide what it writes before an answer.
        """
        turns: list[Message] = [*self.pair.prompt, getattr(self.pair, side)]
        whole = self._conversation(turns)
        for key in sorted(turns[-1].keys() - PLAIN):
            without = _without(turns, -1, key)
            if not self._is_written(side, key, whole, self._conversation(without)):
                turns = without
        response = self.template.answer_text(self.prompt, whole)
        if response is None:
            raise BadRow(
                f"{side}: the chat template writes the prompt or the end of the turn in another way here"
            )
        return response, turns[-1]

    def _refuse_control_tokens(self) -> None:
        """A text that holds them was rendered before; what else the template writes has no guard."""
        # Most rows hold none: all texts of a row are searched at once, and one by one only where one does.
        if self.template.holds_control_token("\n".join(message["content"] for message in self.messages)):
            sides = (*("prompt" for _ in self.pair.prompt), "chosen", "rejected")
            for side, message in zip(sides, self.messages, strict=True):
                if self.template.is_templated(message["content"]):
                    raise BadRow(f"{side}: {TEMPLATED}; give the messages themselves")
        if self.is_plain and not self.pair.tools and not self.pair.template_kwargs:
            return
        extras = [
            {key: value for key, value in message.items() if key not in PLAIN} for message in self.messages
        ]
        written = [self.pair.tools, *extras, self.pair.template_kwargs]
        text = json.dumps(written, ensure_ascii=False, default=str)
        if self.template.holds_control_token(text):
            raise BadRow(
                "prompt: a control token of the chat template in tools, arguments or keys of a message"
            )
        if any(mark in text for mark in GUARD):  # a template may write two keys side by side
            raise BadRow(
                "prompt: the noncharacters U+FDD0 and U+FDD1 in tools, arguments or keys of a message"
            )

    def _conversation(self, turns: list[Message]) -> str:
        return self._render(turns, generate=False)


def _without(messages: list[Message], index: int, key: str) -> list[Message]:
    turns: list[Any] = list(messages)
    turns[index] = {name: value for name, value in turns[index].items() if name != key}
    return turns
