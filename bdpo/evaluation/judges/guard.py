"""Safety classifiers that answer in words, as local judges: HarmBench's classifier, Llama Guard, WildGuard.

One loader for all of them. Each has its published prompt as a chat template of two messages, the request and
the response, so that a control token that a response spells stays text. The reply is generated greedily and
must be one of those that the classifier was trained to give; another one is a failure, not a verdict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from bdpo.config import Config, ModelConfig
from bdpo.config.judges import GuardConfig
from bdpo.errors import UserError, first_line
from bdpo.evaluation.judges.base import Failed, JudgeKind, Question, RubricName, Verdict, judge_section
from bdpo.models.loading import (
    architecture,
    has_positions,
    load_model,
    model_folder,
    require_complete_weights,
    weights_digest,
)
from bdpo.models.template import Message
from bdpo.models.tokenizer import ChatTokenizer, require_embedded
from bdpo.models.tokenizer_files import read_tokenizer, require_chat_template, tokenizer_files
from bdpo.models.weight_files import require_finite_files, weight_files
from bdpo.storage.digests import files_digest, json_digest
from bdpo.storage.manifests import Fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_KEY = "evaluate.judge.model"


@dataclass(frozen=True)
class Guard:
    """What one such classifier has of its own."""

    name: str
    """Value of `evaluate.judge.name`."""
    rubrics: frozenset[RubricName]
    parse: Callable[[RubricName, str], Verdict]
    """The verdict that a reply is, by a rubric."""
    template: str | None = None
    """Chat template in Jinja; None takes that of the model's own tokenizer."""
    max_new_tokens: int = 1
    max_response_tokens: int | None = None
    """How many tokens of a response are read, as upstream does; None reads all of it."""


@dataclass(frozen=True)
class GuardJudge:
    """Asks the classifier about one response at a time, so that there is no padding to put on a side."""

    guard: Guard
    model: PreTrainedModel
    chat: ChatTokenizer
    concurrency: int = 1

    def __call__(self, question: Question, response: str) -> Verdict:
        """The verdict of the classifier; `too_long` where prompt and reply exceed its positions."""
        ids = self.prompt_ids(question.request, response)
        if not has_positions(self.model.config, len(ids) + self.guard.max_new_tokens):
            return Failed("too_long")
        return self.guard.parse(question.rubric, self.reply(ids))

    def prompt_ids(self, request: str, response: str) -> list[int]:
        """The published prompt around request and response."""
        most = self.guard.max_response_tokens
        if most is not None:
            ids = self.chat.tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"]
            response = self.chat.decode(ids[:most]) if len(ids) > most else response
        messages = [Message(role="user", content=request), Message(role="assistant", content=response)]
        return self.chat.prompt_ids(messages)

    def reply(self, prompt_ids: list[int]) -> str:
        """What the classifier writes after the prompt, special tokens left out."""
        import torch
        from transformers import GenerationConfig

        tokenizer = self.chat.tokenizer
        eos = self.model.generation_config.eos_token_id if self.model.generation_config else None
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.guard.max_new_tokens,
            eos_token_id=tokenizer.eos_token_id if eos is None else eos,
            pad_token_id=tokenizer.eos_token_id,
        )
        ids = torch.tensor([prompt_ids], device=self.model.device)
        with torch.inference_mode():
            found = self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)  # type: ignore[operator]
        return str(tokenizer.decode(found[0, len(prompt_ids) :], skip_special_tokens=True)).strip()


def load_tokenizer_of(guard: Guard, folder: Path) -> ChatTokenizer:
    """The classifier's tokenizer with its prompt as chat template.

    Raises:
        UserError: it cannot be loaded, it has no chat template and the classifier requires its own, or the
            template cannot be rendered.
    """
    tokenizer = read_tokenizer(folder)
    if guard.template is not None:
        tokenizer.chat_template = guard.template
    require_chat_template(tokenizer, f"{_KEY}={folder}", f"{guard.name} requires one")
    try:
        chat = ChatTokenizer(tokenizer)
        chat.prompt_ids([Message(role="user", content="x"), Message(role="assistant", content="y")])
    except TemplateError as error:
        raise UserError(
            f"{_KEY}={folder}: the chat template cannot be rendered ({first_line(error)})"
        ) from None
    return chat


def guard_kind(guard: Guard) -> JudgeKind:
    """The declaration of a judge of this kind."""

    def check(config: Config) -> str:
        """Weights and tokenizer can be read: from the hub they are fetched now."""
        model = _model(config)
        folder = model_folder(model, _KEY)
        weights_digest(folder)
        require_complete_weights(model, _KEY)
        require_finite_files(weight_files(folder), folder)
        tokenizer = load_tokenizer_of(guard, folder).tokenizer
        require_embedded(tokenizer, architecture(folder, model), f"{_KEY}={model.name_or_path}")
        return f"{model.name_or_path}: weights and tokenizer are read"

    def make(config: Config) -> GuardJudge:
        model = _model(config)
        folder = model_folder(model, _KEY)
        loaded = load_model(folder, model)
        device = "cuda" if config.evaluate.gpus_per_worker else "cpu"
        return GuardJudge(guard, loaded.to(device).eval(), load_tokenizer_of(guard, folder))  # type: ignore[arg-type]

    def fingerprint(config: Config) -> Fingerprint:
        model = _model(config)
        folder = model_folder(model, _KEY)
        read = sorted({*tokenizer_files(folder), *folder.glob("*.jinja")})
        digest = json_digest([weights_digest(folder), files_digest(read), guard.template])
        return {"evaluate.judge.model": model.name_or_path, "judge_weights": digest}

    return JudgeKind(guard.name, guard.rubrics, make, fingerprint, check, has_model=True)


def _model(config: Config) -> ModelConfig:
    dtype = "bfloat16" if config.evaluate.gpus_per_worker else "float32"
    return ModelConfig(name_or_path=judge_section(config, GuardConfig).model, dtype=dtype)  # type: ignore[arg-type]
