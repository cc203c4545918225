"""Chat template -> token ids: prompt, responses, unconditional context.

What is scored, trained and generated is what the template itself writes: the text of prompt, response and
end of turn is a prefix of the template's rendering of the whole conversation. A template of which that is
not true is refused (`load_tokenizer`).

Prompt and response are tokenised separately and concatenated as ids, so a merge across their boundary
cannot happen and the response has the same ids in every context it is scored in. Text that spells one of
the template's control tokens is tokenised as text: no message can end its turn or begin another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jinja2 import TemplateError

from bdpo.config import Config, ModelConfig
from bdpo.errors import UserError, escaped, first_line
from bdpo.models.loading import model_config, model_folder
from bdpo.models.placed_texts import NEWLINE, PlacedTexts
from bdpo.models.template import GUARD, PROBE, QUESTION, ChatTemplate, Message, quoted
from bdpo.models.tokenizer_files import read_tokenizer, require_chat_template, tokenizer_files
from bdpo.models.word_ids import WordIds, word_ids
from bdpo.storage.digests import files_digest, json_digest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


Unconditional = Literal["empty_turn", "bos"]


class EncodedPair(NamedTuple):
    """Token ids of one preference pair; the responses carry their end-of-turn token unless cut."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class ChatTokenizer:
    """A tokenizer seen through its chat template.

    `template_kwargs` are variables of the template, as TRL's `chat_template_kwargs`; every rendering gets
    them.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, template_kwargs or {})
        self._texts = PlacedTexts(tokenizer)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """c(x): the conversation up to and including the generation prompt.

        Raises:
            TemplateError: the template refuses the conversation.
        """
        return self.text_ids(self.template.render(messages))

    def unconditional_ids(self, mode: Unconditional) -> list[int]:
        """c(∅): an empty user turn, or the single BOS (else EOS) token."""
        if mode == "empty_turn":
            return self.prompt_ids([{"role": "user", "content": ""}])
        ids = [i for i in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if i is not None]
        if not ids:
            raise UserError("score.unconditional=bos: the tokenizer has neither a BOS nor an EOS token")
        return ids[:1]

    def response_ids(self, text: str) -> list[int]:
        """An answer as the template writes it after the generation prompt, end of turn included.

        The template trims an answer or does not; so it is the template that writes this one, behind a
        question of one letter: the ids are the same in every context.

        Raises:
            TemplateError: the template writes this answer in a way of its own.
        """
        written = self.template.response_text(text)
        ids = self.answer_ids(written)
        return [*(self.text_ids(written) if ids is None else ids), self.end_of_turn_id]

    def is_faithful(self, messages: Sequence[Message], answer: str) -> bool:
        """Whether prompt, response and end of turn are what the template makes of the whole conversation.

        Text for text; and id for id, but for a merge across a boundary, which leaves the text as it is.

        Raises:
            TemplateError: the template refuses the conversation.
        """
        template = self.template
        whole = template.render([*messages, {"role": "assistant", "content": answer}], generate=False)
        text = template.render(messages) + template.response_text(answer)
        return self.begins(whole, text, self.prompt_ids(messages) + self.response_ids(answer))

    def begins(self, whole: str, text: str, ids: list[int]) -> bool:
        """Whether a rendered conversation begins with a prompt and an answer, their end of turn included.

        `text` is both as texts without that end, `ids` are the ids of both with it. Ids may differ by a merge
        across a boundary, which leaves the decoded text as it is.
        """
        if not whole.startswith(text + self.template.assistant_turn.end):
            return False
        theirs = self.text_ids(whole)
        return theirs[: len(ids)] == ids or self.decode(theirs).startswith(self.decode(ids))

    def prefill_ids(self, text: str) -> list[int]:
        """The ids of the beginning of an answer, which generation continues."""
        return self._texts.guarded(self.template.prefill_text(text), self._before)

    @property
    def end_of_turn_id(self) -> int:
        """The token that ends an assistant turn: where generation stops."""
        return self.template.assistant_turn.end_id

    def text_ids(self, text: str, continues: bool = False) -> list[int]:
        """The ids of a rendered text, which may continue another; no special tokens are added.

        The template has written those that it needs (BOS above all). Where a guard was, two tokens end:
        the control token around it is none.
        """
        return self._texts.guarded(text, (NEWLINE,) if continues else ("",))

    def answer_ids(self, text: str) -> list[int] | None:
        """The ids of an answer, as the template writes it, between generation prompt and end of turn.

        Most tokenizers give a text the same ids wherever it stands. Others put a space before a text
        (SentencePiece), or have added tokens that take the spaces beside them (`rstrip` and `lstrip`, as in
        Phi-3 and Phi-4): there the ids are those of the text in its place. None if there are no such ids: a
        token of the answer merges with what stands beside it, and alone it would be another text.
        """
        if not self._depends_on_place:
            return self.text_ids(text)
        before, end = self._before[0], self.template.assistant_turn.end
        in_place = None if GUARD in text else self._texts.between((before,), text, end)
        if in_place is not None:
            return in_place
        ids = self._texts.guarded(text, self._before, self._behind)
        ours = [*self._texts.neighbour(before), *ids, self.end_of_turn_id]
        theirs = self.text_ids(before + text + end)
        return ids if ours == theirs or self.decode(ours) == self.decode(theirs) else None

    def ids_of_answers(self, texts: Sequence[str]) -> list[list[int] | None]:
        """`answer_ids` of many texts at once."""
        if self._depends_on_place:
            return [self.answer_ids(text) for text in texts]
        return [*self.ids_of_texts(texts)]

    def ids_of_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """`text_ids` of many texts at once: word by word, or without a fast tokenizer's offsets and masks."""
        backend = self._backend
        if backend is None:
            return [self.text_ids(text) for text in texts]
        known = [self._words.ids(text) if self._words is not None else None for text in texts]
        backend.no_truncation()  # settings of the tokenizer's file, which transformers sets at every call
        backend.no_padding()
        rest = [text for text, ids in zip(texts, known, strict=True) if ids is None and GUARD not in text]
        encodings = iter(backend.encode_batch_fast(rest, add_special_tokens=False))
        return [
            ids if ids is not None else self.text_ids(text) if GUARD in text else next(encodings).ids
            for text, ids in zip(texts, known, strict=True)
        ]

    @property
    def _backend(self) -> Any:
        """The tokenizer of the library `tokenizers`; None if this one is not written with it."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return backend if hasattr(backend, "encode_batch_fast") else None

    @cached_property
    def _words(self) -> WordIds | None:
        return word_ids(self._backend)

    @cached_property
    def _before(self) -> tuple[str, ...]:
        """What an answer is tokenised behind: the generation prompt from its last added token, or a newline.

        No text where the ids of an answer are the same wherever it stands.
        """
        tail, texts = self.template.generation_header, self._texts
        token = texts.added_tokens.get(tail.rstrip())
        placed = texts.between((tail,), PROBE) not in (None, texts.ids(PROBE))
        return (tail, NEWLINE) if placed or texts.are_prefixed or (token and token.rstrip) else ("",)

    @cached_property
    def _behind(self) -> str:
        """What an answer is tokenised before: an end of turn that takes the spaces before it, or no text."""
        end = self.template.assistant_turn.end
        token = self._texts.added_tokens.get(end)
        return end if token and token.lstrip else ""

    @property
    def _depends_on_place(self) -> bool:
        return bool(self._before[0] or self._behind)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return self._texts.decode(ids)


def load_tokenizer(model: ModelConfig) -> ChatTokenizer:
    """Load the tokenizer of a model and make sure that it has a chat template that can be used.

    Raises:
        UserError: it cannot be loaded, its chat template is useless or does not read one of
            `model.template_kwargs`, or it has none and `model.chat_template` names none.
    """
    folder = model_folder(model)
    hf_config = model_config(model)  # first, since a tokenizer reads config.json as well
    tokenizer = read_tokenizer(folder, model.trust_remote_code)
    if model.chat_template:
        tokenizer.chat_template = read_template(model.chat_template)
    name = f"model.name_or_path={model.name_or_path}"
    require_chat_template(tokenizer, name, "set model.chat_template to a Jinja file")
    chat = faithful_chat(tokenizer, model.template_kwargs, str(folder))
    require_embedded(tokenizer, hf_config, name)
    return chat


def faithful_chat(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any], name: str
) -> ChatTokenizer:
    """A tokenizer with a chat template, seen through it; every rendering gets `template_kwargs`.

    Raises:
        UserError: the template cannot be used, or does not read one of `template_kwargs`; the message begins
            with `name`.
    """
    chat = ChatTokenizer(tokenizer, template_kwargs)
    try:
        _require_read(chat.template, template_kwargs)
        _require_no_marks(chat.template)
        require_faithful_template(chat)
    except TemplateError as error:
        raise UserError(f"{name}: the chat template cannot be rendered ({first_line(error)})") from None
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return chat


def require_faithful_template(chat: ChatTokenizer) -> None:
    """Make sure that the template writes a probe of one turn and one of several as they are encoded.

    Raises:
        TemplateError: the template cannot be rendered.
        UserError: it does not; both renderings are named.
    """
    answer: Message = {"role": "assistant", "content": PROBE}
    for messages in ([QUESTION], [QUESTION, answer, QUESTION]):
        if not chat.is_faithful(messages, PROBE):
            raise UserError(
                "chat template: prompt, response and end of turn are not what it makes of the whole "
                f"conversation; they are {quoted(chat.decode(chat.prompt_ids(messages)))} and "
                f"{quoted(chat.decode(chat.response_ids(PROBE)))}, the whole is "
                f"{quoted(chat.template.render([*messages, answer], generate=False))}"
            )


def _require_no_marks(template: ChatTemplate) -> None:
    """Make sure that the template begins with no byte order mark and writes no guards of its own.

    Raises:
        TemplateError: the template cannot be rendered.
        UserError: it does.
    """
    if template.question.startswith("\ufeff"):
        raise UserError(
            "chat template: begins with a byte order mark (U+FEFF), which would begin every prompt; "
            "save the template without one"
        )
    if GUARD in template.question:  # it would be taken out again
        raise UserError("chat template: writes the noncharacters U+FDD0 and U+FDD1, which bdpo uses itself")


def _require_read(template: ChatTemplate, kwargs: Mapping[str, Any]) -> None:
    """Make sure that the template reads each of `model.template_kwargs`: another would have no effect.

    Raises:
        TemplateError: the template is not Jinja.
        UserError: it does not; the nearest name that it reads is named.
    """
    for name in kwargs:
        read = sorted(template.free_variables)
        if name in read:
            continue
        near = get_close_matches(name, read, 1)
        hint = f"did you mean {near[0]}?" if near else f"it reads {', '.join(read) or 'no variables'}"
        raise UserError(f"model.template_kwargs.{escaped(name)}: the chat template does not read it; {hint}")


def require_embedded(tokenizer: PreTrainedTokenizerBase, hf_config: PreTrainedConfig, name: str) -> None:
    """Make sure that the model has an embedding for each token; of the padding token nothing is asked.

    Raises:
        UserError: it has not; the message begins with `name`.
    """
    rows = getattr(hf_config.get_text_config(), "vocab_size", None)
    ids = set(tokenizer.get_vocab().values()) - {tokenizer.pad_token_id}
    if rows is not None and max(ids) >= rows:
        raise UserError(
            f"{name}: the tokenizer has ids up to {max(ids)}, the model has {rows} embeddings; they are not "
            "of one model"
        )


def tokenizer_fingerprint(model: ModelConfig) -> dict[str, str]:
    """Digests of all that decides which ids a text becomes: tokenizer files and chat template."""
    return {
        "tokenizer": files_digest(tokenizer_files(model_folder(model))),
        "chat_template": json_digest(load_tokenizer(model).tokenizer.chat_template),
        **({"template_kwargs": json_digest(model.template_kwargs)} if model.template_kwargs else {}),
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
        return Path(file).read_text(encoding="utf-8-sig")  # a byte order mark is no part of the text
    except (OSError, ValueError) as error:  # not UTF-8, or no path: a NUL
        raise UserError(f"model.chat_template={escaped(file)}: cannot be read ({error})") from None
