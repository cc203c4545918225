"""Generation for one batch of prompts, greedy or sampled.

The answer to a prompt does not depend on the batch it is in: left padding is masked, positions count from
the first real token, and nothing but the argmax decides (up to rounding, so exactly in float32 unless two
logits tie); what is sampled is seeded by the prompt. Cutting a set of prompts into batches and sorting it
by length is the caller's part. Another engine behind the same signature: `bdpo.evaluation.engines.vllm`.
Top-p and beams
are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bdpo.errors import UserError
from bdpo.evaluation.engines.base import Answer, Sampling
from bdpo.evaluation.thoughts import decode_answer
from bdpo.models.loading import has_positions, positions_of
from bdpo.models.template import Message
from bdpo.models.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    chat: ChatTokenizer,
    prompts: Sequence[Sequence[Message]],
    max_new_tokens: int,
    *,
    prefills: Sequence[Sequence[int]] | None = None,
    sampling: Sampling | None = None,
) -> list[Answer]:
    """The model's answers to the prompts, without special tokens; thoughts are marked, see `decode_answer`.

    An answer ends before the template's end-of-turn token, before the model's own EOS tokens, or after
    `max_new_tokens`. The model is in evaluation mode (as `from_pretrained` leaves it) on any device.
    `prefills` are ids that each assistant's turn already begins with; they are no part of the answer.
    Without `sampling` it is greedy; else a prompt's answer is a sample that the seed and the prompt decide.

    Raises:
        UserError: a prompt and its answer need more positions than the model has.
    """
    if not prompts:
        return []
    prompt_ids = begun_ids(chat, prompts, prefills)
    require_positions(model.config, prompt_ids, max_new_tokens)
    stops = stop_ids(model.generation_config, chat)
    pad = chat.end_of_turn_id  # masked; a tokenizer's pad token may be missing, or beyond the embedding
    input_ids, attention_mask = _left_padded(prompt_ids, pad)
    finite = _FiniteLogits()
    noise = [_GumbelNoise(prompt_ids, sampling)] if sampling else []
    with _without_generation_defaults(model):
        output = model.generate(  # type: ignore[operator]  # a mixin's method, which mypy takes for a tensor
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=sorted(stops),
            logits_processor=[finite, *noise],
        )
    rows = output[:, input_ids.shape[1] :].tolist()
    return [
        answer(chat, ids, stops, max_new_tokens, known)
        for ids, known in zip(rows, finite.rows(), strict=True)
    ]


def begun_ids(
    chat: ChatTokenizer, prompts: Sequence[Sequence[Message]], prefills: Sequence[Sequence[int]] | None
) -> list[list[int]]:
    """What the answers continue: each prompt's ids up to the assistant's turn, and those of its prefill."""
    begun = prefills if prefills is not None else [()] * len(prompts)
    return [[*chat.prompt_ids(prompt), *ids] for prompt, ids in zip(prompts, begun, strict=True)]


class _FiniteLogits:
    """Watches which rows had logits that are no numbers, without waiting for the device at each step.

    A row that is done keeps being forwarded, so a fault behind its end counts as well: such a model has no
    score anyway. Minus infinity is a number here: models mask padded parts of their vocabulary with it.
    """

    def __init__(self) -> None:
        self.broken: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores`: float, shape (rows, vocabulary)."""
        largest = scores.amax(-1)  # of a row with nan it is nan
        found = ~largest.isfinite()
        self.broken = found if self.broken is None else self.broken | found
        return scores

    def rows(self) -> list[bool]:
        """Whether all logits of a row were numbers, for each row."""
        return [] if self.broken is None else (~self.broken).tolist()


class _GumbelNoise:
    """Makes the argmax of greedy search a sample of softmax(logits / temperature), row by row.

    argmax(logits / T + g) with g ~ Gumbel(0, 1) is distributed so (the Gumbel-max trick; Maddison et al.,
    arXiv 1411.0030). Each row has a generator of its own, so other rows and padding do not matter, which
    the shared generator of `do_sample` would make them.
    """

    def __init__(self, prompt_ids: list[list[int]], sampling: Sampling) -> None:
        self.temperature = sampling.temperature
        self.seeds = sampling.seeds(prompt_ids)
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores`: float, shape (rows, vocabulary)."""
        if not self.generators:
            self.generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds]
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores / self.temperature - noise.log()


def require_positions(config: PreTrainedConfig, prompt_ids: list[list[int]], max_new_tokens: int) -> int:
    """What the longest prompt and its answer take.

    Raises:
        UserError: the model has fewer: no prompt is cut, no rotary position runs past training.
    """
    longest = max(map(len, prompt_ids), default=0)
    if not has_positions(config, longest + max_new_tokens):
        raise UserError(
            f"a prompt of {longest} tokens and evaluate.max_new_tokens={max_new_tokens} exceed "
            f"the {positions_of(config)} positions of the model"
        )
    return longest + max_new_tokens


def shipped_generation_config(folder: Path, config: PreTrainedConfig) -> GenerationConfig:
    """What `from_pretrained` gives the model of a folder, without loading the model."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return GenerationConfig.from_model_config(config)


def stop_ids(shipped: GenerationConfig, chat: ChatTokenizer) -> set[int]:
    """The end of turn of the template, and the EOS tokens of the model's own generation config."""
    own = shipped.eos_token_id
    own = own if isinstance(own, list) else [own]
    return {chat.end_of_turn_id, *(i for i in own if i is not None)}


def _left_padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, both int64 of shape (rows, longest row)."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@contextmanager
def _without_generation_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Set aside the generation config that the model ships.

    Chat models ship sampling settings, and transformers fills in every one that a call leaves out. A
    repetition penalty (Qwen2 has 1.05) would act on greedy search too, and count the padding.
    """
    from transformers import GenerationConfig

    shipped = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = shipped


def answer(
    chat: ChatTokenizer, ids: Sequence[int], stops: set[int], max_new_tokens: int, finite: bool = True
) -> Answer:
    """The answer that ids up to the first stop make; see `decode_answer` for its text."""
    own = list(takewhile(lambda i: i not in stops, ids))
    stopped = len(own) < len(ids)
    cut = not stopped and len(own) >= max_new_tokens
    return Answer(decode_answer(chat, own), len(own) + stopped, cut=cut, finite=finite)
