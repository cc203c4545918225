"""What a chat template writes, as text: prompts, answers, and what stands around them.

What is scored, trained and generated is what the template itself writes. A template of which that cannot
be true is refused with what it renders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from string import ascii_letters
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from jinja2 import TemplateError

from bdpo.config.model import RESERVED_TEMPLATE_KWARGS
from bdpo.errors import UserError
from bdpo.models.template_variables import free_names
from bdpo.models.tool_calls import PROBE_ARGUMENTS, PROBE_CALL, with_text_arguments
from bdpo.models.transformers_private import parsed_template, text_renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Llama 3.2 and others write the date of the day into every prompt: scores would be stale the day after.
# So all that a template learns of the time is what Llama's takes where there is no clock. A macro, because
# transformers lets no function through to a template; it shadows the clock that it offers.
_TODAY = datetime(2024, 7, 26)


def _codes() -> dict[str, str]:
    """What `strftime` makes of each code, with and without the flags of the C library (`%-d`)."""
    letters = ascii_letters.replace("s", "")  # `%s` would be of the time zone of the machine
    written = {f"%{flag}{c}": _TODAY.strftime(f"%{flag}{c}") for flag in ("", *"-_0^#") for c in letters}
    known = {code: text for code, text in written.items() if "%" not in text}
    return {**known, "%s": str(int(_TODAY.replace(tzinfo=UTC).timestamp()))}


_CLOCK = (
    "{% macro strftime_now(format) %}{% set now = namespace() %}{% for part in format.split('%%') %}"
    f"{{% set now.text = part %}}{{% for code, text in {_codes()!r}.items() %}}"
    "{% set now.text = now.text | replace(code, text) %}{% endfor %}{% if '%' in now.text %}"
    "{{ raise_exception('strftime_now: ' ~ format ~ ' has an unknown code') }}{% endif %}"
    "{{ '%' if not loop.first }}{{ now.text }}{% endfor %}{% endmacro %}\n"  # the line leaves no trace
)


class Message(TypedDict):
    """One turn, as in TRL and the chat templates; a template may write other keys than these, too."""

    role: str
    content: str
    tool_calls: NotRequired[list[Any]]


QUESTION: Message = {"role": "user", "content": "x"}
PROBE = "bdpoprobe"

PLAIN = {"role", "content"}  # the keys of a message that is a text alone

# Put into every control token that a message spells, and taken out again before tokenisation. The two are
# noncharacters, which Unicode reserves for such use: no text that is meant for others has them.
GUARD = "\ufdd0\ufdd1"

THOUGHT_MARK = re.compile(
    r"[<\[◁][^<>\[\]◁▷\s]{0,32}(?:think|thought|reason)[^<>\[\]◁▷\s]{0,32}[>\]▷]", re.IGNORECASE
)
"""A word of thinking in brackets, which the marks of all families have: `<think>`, `</think>`, `[THINK]`,
`<|START_THINKING|>`, `<seed:think>`, `◁think▷`. Many templates look for them in an answer and write them.
They end no turn and begin none. Without a limit the search of a long word would take quadratic time."""

_HTML = {"<s>", "</s>"}  # of some tokenizers the begin and the end of a text


@dataclass(frozen=True)
class AssistantTurn:
    """What the template writes around an answer: `header` and `gap` are whitespace, `end` follows.

    `after` is all that follows the answer: `gap`, `end`, and perhaps a newline.
    """

    header: str
    gap: str
    end: str
    end_id: int
    after: str


class ChatTemplate:
    """The chat template of a tokenizer with the variables that every rendering gets."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.variables = dict(variables)
        self._writes_turn: dict[tuple[tuple[str, ...], int], bool] = {}
        self._written_as: dict[tuple[tuple[str, ...], int], str | None] = {}

    def render(
        self, messages: Sequence[Message], generate: bool = True, arguments: Mapping[str, Any] | None = None
    ) -> str:
        """The conversation as the template writes it, with a guard inside each control token of its texts.

        `arguments` are `tools` and variables of this conversation alone.

        Raises:
            TemplateError: the template refuses the conversation.
        """
        guarded = [{**self._as_taken(m), "content": self.guarded(m["content"])} for m in messages]
        return self._render(guarded, generate, arguments or {})

    def _as_taken(self, message: Message) -> Mapping[str, Any]:
        """The message with its tool calls as the template takes them: their arguments are objects or JSON."""
        return with_text_arguments(message) if "tool_calls" in message and self._takes_json else message

    @cached_property
    def _takes_json(self) -> bool:
        """Whether the template wants arguments as JSON: of an object it writes the Python, or refuses it."""
        with suppress(TemplateError):
            if str(PROBE_ARGUMENTS) not in self._render([QUESTION, PROBE_CALL], False, {}):
                return False
        with suppress(TemplateError):
            self._render([QUESTION, with_text_arguments(PROBE_CALL)], False, {})
            return True
        return False

    def _render(
        self, messages: Sequence[Mapping[str, Any]], generate: bool, arguments: Mapping[str, Any]
    ) -> str:
        conversation: list[Any] = list(messages)
        try:
            if conversation and not arguments and all(message.keys() == PLAIN for message in conversation):
                text = self._text_renderer(conversation, generate)
            else:
                settings: Any = {**self.variables, **arguments, "chat_template": self._template}
                text = str(
                    self.tokenizer.apply_chat_template(
                        conversation, tokenize=False, add_generation_prompt=generate, **settings
                    )
                )
            text.encode()  # a lone surrogate is no text for any tokenizer
        except TemplateError:
            raise
        except Exception as error:  # a template is a program, and its author's errors are of any class
            raise TemplateError(f"{type(error).__name__} in the chat template") from error
        return text

    @cached_property
    def _text_renderer(self) -> Callable[[list[Any], bool], str]:
        """Most conversations are texts alone: rendered without what transformers does for others."""
        return text_renderer(self.tokenizer, self._template, self.variables)

    def response_text(self, text: str) -> str:
        """An answer as the template writes it, up to the end of turn; see `render` for its guards.

        Raises:
            TemplateError: the template writes something else around this answer than around others.
        """
        turn = self.assistant_turn
        whole = self.render([QUESTION, {"role": "assistant", "content": text}], generate=False)
        if not (whole.startswith(self.question + turn.header) and whole.endswith(turn.after)):
            raise TemplateError("the chat template writes this answer in a way of its own")
        return whole[len(self.question) : len(whole) - len(turn.after)] + turn.gap

    def answer_text(self, prompt: str, whole: str) -> str | None:
        """The answer in a rendered conversation, up to the end of turn; None if there is no such answer.

        There is none unless the conversation begins with the rendered `prompt`, up to and including the
        generation prompt, and ends with an end of turn and what the template writes behind one.
        """
        turn = self.assistant_turn
        ending = turn.after.removeprefix(turn.gap)
        if not (whole.startswith(prompt) and whole[len(prompt) :].endswith(ending)):
            return None
        return whole[len(prompt) : len(whole) - len(ending)]

    def prefill_text(self, text: str) -> str:
        """The beginning of an answer: behind what the template writes before one, and not trimmed."""
        return self.assistant_turn.header + self.guarded(text)

    def writes_turn(self, roles: tuple[str, ...], index: int) -> bool:
        """Whether the template writes the turn `index` of a conversation with these roles, shown by a probe.

        False also if it refuses the probe.
        """
        if (roles, index) not in self._writes_turn:
            turns = [Message(role=role, content=PROBE if i == index else "x") for i, role in enumerate(roles)]
            written = False
            with suppress(TemplateError):
                written = PROBE in self._render(turns, True, {})
            self._writes_turn[roles, index] = written
        return self._writes_turn[roles, index]

    def written_as(self, roles: tuple[str, ...], index: int) -> str | None:
        """The speaker, assistant or user, as whose turn the template writes the turn `index` of another role.

        None where it does not. A template with branches for two roles writes all others in one of the two: a
        text of a tool or of the system becomes one of the assistant, or of the user. A probe of a
        conversation with these roles shows it.
        """
        if (roles, index) not in self._written_as:
            self._written_as[roles, index] = next(self._confused_with(roles, index), None)
        return self._written_as[roles, index]

    def _confused_with(self, roles: tuple[str, ...], index: int) -> Iterator[str]:
        turns = [Message(role=role, content="x") for role in roles]
        for role in ("assistant", "user"):
            with suppress(TemplateError):  # a template that refuses one of the two distinguishes them
                others = [*turns[:index], Message(role=role, content="x"), *turns[index + 1 :]]
                if self._render(turns, True, {}) == self._render(others, True, {}):
                    yield role

    @cached_property
    def assistant_turn(self) -> AssistantTurn:
        """What the template puts around an answer, read off a rendered probe.

        Mistral's template, for one, writes a space before the answer, and chat models end a turn with a
        token that is often not the tokenizer's EOS (`<|im_end|>`) and, in Phi-3 and Gemma 3, not even a
        named special token: it is the first *added* token after the answer.

        Raises:
            UserError: the template loses the answer, writes other than whitespace between the generation
                prompt and the answer or between the answer and an added token, or has no such token.
        """
        whole = self.render([QUESTION, {"role": "assistant", "content": PROBE}], generate=False)
        if PROBE not in whole:
            raise UserError("chat template: an assistant turn does not contain its own text")
        before, after = whole.rsplit(PROBE, 1)
        header = before.removeprefix(self.question)
        if not before.startswith(self.question) or header.strip():
            raise UserError(
                f"chat template: it does not write an answer where its generation prompt ends; with it "
                f"{quoted(self.question)}, the whole conversation {quoted(whole)}; set "
                "model.template_kwargs (enable_thinking: false, say), or model.chat_template to a template "
                "whose generation prompt is complete"
            )
        found = self._added_tokens.search(after)
        if found is None or after[: found.start()].strip():
            raise UserError(
                f"chat template: no added token of the tokenizer ends an assistant turn; the whole "
                f"conversation is {quoted(whole)}; set model.chat_template to a template that writes one"
            )
        gap, end = after[: found.start()], found[0]
        end_id: Any = self.tokenizer.convert_tokens_to_ids(end)
        return AssistantTurn(header, gap, end, int(end_id), after)

    @cached_property
    def _template(self) -> str:
        template = self.tokenizer.get_chat_template()
        return _CLOCK + template if "strftime_now" in template else template

    @cached_property
    def free_variables(self) -> frozenset[str]:
        """The names that the template reads and that no rendering decides: what `template_kwargs` may set.

        Raises:
            TemplateError: the template is not Jinja.
        """
        decided = RESERVED_TEMPLATE_KWARGS | self.tokenizer.special_tokens_map.keys()
        return free_names(parsed_template(self._template)) - decided

    @cached_property
    def question(self) -> str:
        """The rendered prompt in front of a probe."""
        return self.render([QUESTION])

    @cached_property
    def generation_header(self) -> str:
        """The end of the rendered question, from its last added token on; all of it if it has none."""
        starts = [found.start() for found in self._added_tokens.finditer(self.question)]
        return self.question[starts[-1] if starts else 0 :]

    @cached_property
    def _added_tokens(self) -> re.Pattern[str]:
        """Tokens beside the vocabulary of words. Runs of spaces and newlines are added tokens of many."""
        added = {*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens}
        return _any_of(token for token in added if token.strip(" \t\r\n▁"))

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        return _any_of(self._control_spellings)

    @cached_property
    def _control_spellings(self) -> set[str]:
        """The added tokens that structure a conversation: special ones, and all that the template writes.

        The marks of thoughts are none of them: a template that splits a thought off an answer has to see
        them, and all that renders with a template writes them as their tokens.
        """
        special = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        turns: list[Message] = [QUESTION, {"role": "assistant", "content": PROBE}, QUESTION]
        written = self._added_tokens.findall(self._render(turns, True, {}))
        with suppress(TemplateError):  # some know no system turns
            written += self._added_tokens.findall(
                self._render([{**QUESTION, "role": "system"}, *turns], True, {})
            )
        found = {*written, *self.tokenizer.all_special_tokens, *special} - {""}
        return {token for token in found if not THOUGHT_MARK.fullmatch(token)}

    @cached_property
    def _control_starts(self) -> tuple[str, ...]:
        """The characters that control tokens begin with: most texts have none of them."""
        return tuple({token[0] for token in self._control_spellings})

    def _may_hold_control_token(self, text: str) -> bool:
        return any(map(text.__contains__, self._control_starts))  # faster than a generator

    def holds_control_token(self, text: str) -> bool:
        """Whether a text spells a token that structures a conversation."""
        return self._may_hold_control_token(text) and bool(self._control_tokens.search(text))

    def is_templated(self, text: str) -> bool:
        """Whether a text was written by a chat template before: it holds a control token of this one.

        HTML has `<s>` and `</s>`, too, and one or two characters show nothing: some tokenizers have "!" or a
        line break among their special tokens.
        """
        return self.holds_control_token(text) and any(
            len(found[0].strip()) > 2 and found[0] not in _HTML
            for found in self._control_tokens.finditer(text)
        )

    def holds_thought(self, text: str) -> bool:
        """Whether a text holds a mark of a thought."""
        return THOUGHT_MARK.search(text) is not None

    def guarded(self, text: str) -> str:
        """The text with its control tokens taken apart.

        A guard stands on both sides of each of their characters, so that no neighbour completes another.
        """
        if not self._may_hold_control_token(text):
            return text
        return self._control_tokens.sub(lambda found: GUARD.join(["", *found[0], ""]), text)


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of some tokens; nothing if there are none."""
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def quoted(rendering: str) -> str:
    """A rendering of the probe, on one line."""
    text = repr(rendering)
    return text if len(text) <= 400 else f"{text[:120]}…{text[-280:]}"
