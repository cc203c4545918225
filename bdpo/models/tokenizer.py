"""Chat template -> token ids: prompt, responses, unconditional context.

Prompt and response are tokenised separately and concatenated as ids, so a merge across their boundary
cannot happen and the response has the same ids in every context it is scored in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from jinja2 import TemplateError

from bdpo.config import Config, DataConfig, ModelConfig
from bdpo.errors import UserError, first_line
from bdpo.models.loading import model_folder
from bdpo.storage.digests import files_digest, json_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Unconditional = Literal["empty_turn", "bos"]

# Llama 3.2 and others write the date of the day into every prompt: scores would be stale the day after.
# So all that a template learns of the time is what Llama's takes where there is no clock. A macro, because
# transformers lets no function through to a template; it shadows the clock that it offers.
_TODAY = datetime(2024, 7, 26)

_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('%{d}', '{_TODAY.strftime('%' + d)}')" for d in "aAbBcdeHIjmMpSTuUwxXyY")
    + " }}{% endmacro %}\n"  # a line of its own, which leaves no trace
)


class Message(TypedDict):
    """One turn, as in TRL and the chat templates: `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of one preference pair; the responses carry their end-of-turn token unless cut."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class PromptTooLong(ValueError):
    """The prompt has more tokens than `data.max_prompt_length`; such a row is quarantined, never cut."""


class ChatTokenizer:
    """A tokenizer seen through its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """c(x): the conversation up to and including the generation prompt."""
        return self._ids(self._render(messages))

    def unconditional_ids(self, mode: Unconditional) -> list[int]:
        """c(∅): an empty user turn, or the single BOS (else EOS) token."""
        if mode == "empty_turn":
            return self.prompt_ids([{"role": "user", "content": ""}])
        ids = [i for i in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if i is not None]
        if not ids:
            raise UserError("score.unconditional=bos: the tokenizer has neither a BOS nor an EOS token")
        return ids[:1]

    def response_ids(self, text: str) -> list[int]:
        """An answer as the template writes it after the generation prompt, end of turn included."""
        before, _, end = self._assistant_turn
        return [*self._ids(before + text), end]

    @property
    def end_of_turn_id(self) -> int:
        """The token that ends an assistant turn: where generation stops."""
        return self._assistant_turn[2]

    @cached_property
    def _assistant_turn(self) -> tuple[str, str, int]:
        """What the template puts before and after an answer, and the token that ends the turn.

        Read off a rendered probe: Mistral's template, for one, writes a space before the answer, and
        chat models end a turn with a token that is often not the tokenizer's EOS (`<|im_end|>`).
        """
        probe = "bdpoprobe"
        question: Message = {"role": "user", "content": "x"}
        prompt = self._render([question])
        whole = self._render([question, {"role": "assistant", "content": probe}], generate=False)
        before, found, after = whole.removeprefix(prompt).rpartition(probe)
        if not found:
            raise UserError("chat template: an assistant turn does not contain its own text")
        is_space = whole.startswith(prompt) and before.isspace()
        special = set(self.tokenizer.all_special_ids)
        ends = [i for i in self._ids(after) if i in special] + [self.tokenizer.eos_token_id]
        if ends[0] is None:
            raise UserError("tokenizer: neither the chat template nor an EOS token ends an assistant turn")
        return before if is_space else "", after, ends[0]

    def _render(self, messages: Sequence[Message], generate: bool = True) -> str:
        conversation: list[Any] = list(messages)
        return str(
            self.tokenizer.apply_chat_template(
                conversation,
                chat_template=_CLOCK + self.tokenizer.get_chat_template(),
                tokenize=False,
                add_generation_prompt=generate,
            )
        )

    def _ids(self, text: str) -> list[int]:
        """No special tokens are added: the template has written those it wants (BOS above all)."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def encode_pair(
    chat: ChatTokenizer, pair: Mapping[str, Any], max_prompt_length: int, max_length: int
) -> EncodedPair:
    """Tokenise a pair of columns `prompt` (messages), `chosen` and `rejected` (texts) within the lengths.

    A response is cut on the right to what `max_length` leaves; a cut one has no end-of-turn token.

    Raises:
        PromptTooLong: the prompt has more than `max_prompt_length` tokens.
    """
    prompt = chat.prompt_ids(pair["prompt"])
    if len(prompt) > max_prompt_length:
        raise PromptTooLong(f"prompt has {len(prompt)} tokens, max_prompt_length is {max_prompt_length}")
    room = max_length - len(prompt)
    return EncodedPair(
        prompt, chat.response_ids(pair["chosen"])[:room], chat.response_ids(pair["rejected"])[:room]
    )


def encode_pairs(chat: ChatTokenizer, pairs: Sequence[dict[str, Any]], data: DataConfig) -> list[EncodedPair]:
    """Tokenise prepared pairs within the configured lengths, as scoring and training both see them."""
    return [encode_pair(chat, pair, data.max_prompt_length, data.max_length) for pair in pairs]


def load_tokenizer(model: ModelConfig) -> ChatTokenizer:
    """Load the tokenizer of a model and make sure that it has a chat template that can be used.

    Raises:
        UserError: it cannot be loaded, its chat template is useless, or it has none and
            `model.chat_template` names none.
    """
    from transformers import AutoTokenizer

    folder = model_folder(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: no tokenizer can be loaded ({first_line(error)})") from None
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # what transformers makes of no files
        raise UserError(f"{folder}: no tokenizer can be loaded (its vocabulary is empty)")
    if model.chat_template:
        tokenizer.chat_template = read_template(model.chat_template)
    if not tokenizer.chat_template:
        raise UserError(
            f"model.name_or_path={model.name_or_path}: the tokenizer has no chat template; "
            "set model.chat_template to a Jinja file"
        )
    chat = ChatTokenizer(tokenizer)
    try:
        chat.response_ids("x")
    except TemplateError as error:
        raise UserError(f"{folder}: the chat template cannot be rendered ({first_line(error)})") from None
    return chat


def tokenizer_fingerprint(model: ModelConfig) -> dict[str, str]:
    """Digests of all that decides which ids a text becomes: tokenizer files and chat template."""
    patterns = ("*tok*", "vocab*", "merges*", "*.model")
    files = {file for pattern in patterns for file in model_folder(model).glob(pattern)}
    return {
        "tokenizer": files_digest(sorted(files)),
        "chat_template": json_digest(load_tokenizer(model).tokenizer.chat_template),
    }


def with_template(config: Config) -> Config:
    """The config with the template itself in place of its file, which other nodes may not have."""
    if config.model.chat_template is None:
        return config
    model = config.model.model_copy(update={"chat_template": read_template(config.model.chat_template)})
    return config.model_copy(update={"model": model})


def read_template(file: str) -> str:
    """The Jinja template of a file, or the template itself if that is given: no path has a brace."""
    if "{" in file:
        return file
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"model.chat_template={file}: cannot be read ({error})") from None
