"""Scoring pairs in memory: a loaded model, its tokenizer and rows as dicts. No run folder, no Ray.

`import bdpo` offers it as `bdpo.score_pairs`. `pipelines.score` reads, renders and forwards pairs by the same
functions, so both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import torch

from bdpo.config import DataConfig, ScoreConfig
from bdpo.config.data import SourceConfig
from bdpo.data.formats import detect, format_named
from bdpo.data.formats.base import BadRow, Excluded, Pair
from bdpo.data.prepare import id_of, usable_pair
from bdpo.data.rendering import encode_pairs
from bdpo.data.sources import DETECT_ROWS
from bdpo.errors import UserError
from bdpo.models.borrowed import borrowed_chat, in_evaluation_mode
from bdpo.models.loading import require_positions_for
from bdpo.models.logps import LogpsModel
from bdpo.models.packing import PrefixGroups
from bdpo.models.tokenizer import ChatTokenizer, EncodedPair
from bdpo.scoring.reference import reference_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAMED_ROWS = 5
"""How many unusable rows an error names."""


class ScoringSettings(TypedDict, total=False):
    """Keys of the sections `data`, `score` and `model` (docs/config.md), with the same defaults."""

    format: str
    max_length: int
    max_prompt_length: int
    unconditional: Literal["empty_turn", "bos"]
    tokens_per_batch: int
    template_kwargs: dict[str, Any]


@dataclass(frozen=True)
class ScoredPairs:
    """The scores of some pairs, in the order of their rows.

    Every tensor is on the CPU and has the shape (pairs,). The names are those of the columns of
    `<run_dir>/scores` and `<run_dir>/data/pairs`.
    """

    pair_ids: tuple[str, ...]
    """Digests of the pairs, the same as in a run folder; equal pairs have equal ids."""
    prompt_ids: tuple[list[int], ...]
    """Token ids of c(x), up to and including the generation prompt."""
    chosen_ids: tuple[list[int], ...]
    """Token ids of the responses, each with its end of turn unless `max_length` cuts it."""
    rejected_ids: tuple[list[int], ...]
    prompt_tokens: torch.Tensor
    """int64, as are the other numbers of tokens; those of a response count its end of turn."""
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor
    ref_chosen_logps: torch.Tensor
    """log π(y|c(x)) summed over the tokens of a response, in nats; float32, as are those that follow."""
    ref_rejected_logps: torch.Tensor
    uncond_chosen_logps: torch.Tensor
    """The same in the unconditional context: log π(y|c(∅))."""
    uncond_rejected_logps: torch.Tensor
    mi_chosen: torch.Tensor
    """Mutual information I(x;y) of query and response, nats per token (arXiv 2603.22829)."""
    mi_rejected: torch.Tensor
    ches: torch.Tensor
    """CHES (arXiv 2410.08847), how alike the hidden states of both responses are; NaN where it is unknown."""

    def __len__(self) -> int:
        return len(self.pair_ids)

    def columns(self) -> dict[str, list[Any]]:
        """All fields as lists by their names, which are TRL's where TRL has one, for `Dataset.from_dict`."""
        return {
            name: values.tolist() if isinstance(values, torch.Tensor) else list(values)
            for name, values in vars(self).items()
        }


def score_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Mapping[str, Any]],
    **settings: Unpack[ScoringSettings],
) -> ScoredPairs:
    """Log-probs of both responses of each pair, with and without its query, and their mutual information.

    `pairs` are rows of any format of docs/data.md, such as `{"prompt": ..., "chosen": ..., "rejected": ...}`;
    every row gets its scores, equal ones as well. `model` is forwarded on its device, in its dtype, with
    dropout off, and is afterwards as it was; of a model with its attention `sdpa` or `flex_attention` a
    prompt is forwarded once for both responses. The model is the reference: of one with a LoRA adapter pass
    `peft_model.get_base_model()`, within `peft_model.disable_adapter()`.

    Raises:
        ValueError: a setting has no sense (pydantic's ValidationError names it).
        TypeError: `model` is not a PreTrainedModel of transformers.
        UserError: a row cannot be used, which the message names by its number, counted from 0, and by its
            column; the rows are of no known format; `tokenizer` has no chat template, or one that cannot be
            used; or the model has too few positions or embeddings.
        FloatingPointError: a log-prob is not finite.
    """
    data, score, template_kwargs = _sections(settings)
    chat = borrowed_chat(model, tokenizer, template_kwargs)
    require_positions_for(data.max_length, model.config, "the model")
    read = _read(pairs, data)
    encoded, pair_ids = zip(*_encoded(chat, read, data), strict=True)
    unconditional = chat.unconditional_ids(score.unconditional)
    with _with_logps(model, data.max_length) as logps:
        scores = reference_scores(logps, PrefixGroups.of(encoded), unconditional, score.tokens_per_batch)
    # A clone of a tensor of the inference mode can be saved for a backward; that tensor itself cannot.
    own = {name: values.clone() for name, values in scores.items()}
    prompts, chosen, rejected = zip(*encoded, strict=True)
    return ScoredPairs(pair_ids, prompts, chosen, rejected, **own)


def _sections(settings: ScoringSettings) -> tuple[DataConfig, ScoreConfig, dict[str, Any]]:
    unknown = settings.keys() - ScoringSettings.__annotations__.keys()
    if unknown:
        known = ", ".join(ScoringSettings.__annotations__)
        raise ValueError(f"{', '.join(sorted(unknown))}: not one of {known}")
    given: dict[str, Any] = {**settings}
    template_kwargs = given.pop("template_kwargs", {})
    score = {name: given.pop(name) for name in ("unconditional", "tokens_per_batch") if name in given}
    return DataConfig(path="pairs", **given), ScoreConfig(**score), template_kwargs


def _read(rows: Sequence[Mapping[str, Any]], data: DataConfig) -> list[Pair]:
    """The pair of each row."""
    if not rows:
        raise UserError("pairs: is empty")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise UserError(f"pairs[{number}]: expects a dict, not a {type(row).__name__}")
    form = detect(rows[:DETECT_ROWS], "pairs") if data.format == "auto" else format_named(data.format)
    source, pairs, reasons = SourceConfig(path="pairs"), [], {}
    for number, row in enumerate(rows):
        try:
            pairs.append(usable_pair(form, dict(row), source))
        except (BadRow, Excluded) as reason:
            reasons[number] = str(reason)
    _refuse(reasons)
    return pairs


def _encoded(chat: ChatTokenizer, pairs: Sequence[Pair], data: DataConfig) -> list[tuple[EncodedPair, str]]:
    """The token ids of each pair and its `pair_id`, that of `bdpo.data.prepare`."""
    encoded = encode_pairs(chat, pairs, data)
    _refuse({number: str(one) for number, one in enumerate(encoded) if isinstance(one, BadRow)})
    return [(one[0], id_of(one[1].written)) for one in encoded if not isinstance(one, BadRow)]


def _refuse(reasons: Mapping[int, str]) -> None:
    """Raise a UserError with the numbers of the rows that cannot be used, and why."""
    if reasons:
        named = "; ".join(f"pairs[{number}]: {reasons[number]}" for number in sorted(reasons)[:NAMED_ROWS])
        more = f"; and {len(reasons) - NAMED_ROWS} more" if len(reasons) > NAMED_ROWS else ""
        raise UserError(f"{named}{more}")


@contextmanager
def _with_logps(model: PreTrainedModel, max_length: int) -> Iterator[LogpsModel]:
    """The model with a head that computes log-probs, without dropout; afterwards it is as it was."""
    head = model.get_output_embeddings()
    with in_evaluation_mode(model):
        try:
            yield LogpsModel(model, max_length)
        finally:
            model.set_output_embeddings(head)
