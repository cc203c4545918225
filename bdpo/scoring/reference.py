"""One pass of the reference model over the pairs, which computes all that training and search need of it.

For each pair: four sums of log-probs (both responses, with and without the query), the mutual information
computed from them, and CHES, the similarity of the two responses' hidden states. None of these depends on
alpha, beta or training, so all trials share one scoring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import pyarrow as pa
import torch

from bdpo.config import Config
from bdpo.data.pairs import prefix_groups
from bdpo.method.ches import ches
from bdpo.method.mi import mutual_information
from bdpo.models.ahead import made_ahead
from bdpo.models.arrangement import length_sorted_batches
from bdpo.models.attention import attention_of
from bdpo.models.loading import load_model, model_folder
from bdpo.models.logps import LogpsModel
from bdpo.models.oom import out_of_memory
from bdpo.models.packing import Batch, PrefixGroups
from bdpo.models.tokenizer import load_tokenizer
from bdpo.scoring.scores import SCORE_SCHEMA, TOKEN_COLUMNS

Progress: TypeAlias = Callable[[float], None]
"""Called with the number of pairs that are scored so far."""


def _unseen(pairs: float) -> None:
    """The progress that nobody looks at."""


class ReferenceScorer:
    """The frozen reference model; `score` computes the columns of the score table."""

    def __init__(self, config: Config, device: str) -> None:
        self.config = config
        self.chat = load_tokenizer(config.model)
        attention = attention_of(config, torch.device(device))
        model = load_model(model_folder(config.model), config.model, attention)
        self.model = LogpsModel(model, config.data.max_length).to(device).eval()
        self.unconditional = self.chat.unconditional_ids(config.score.unconditional)

    def score(self, pairs: pa.Table, progress: Progress = _unseen) -> pa.Table:
        """Rows of PAIR_SCHEMA -> rows of SCORE_SCHEMA, in the same order; `progress` as in `reference_logps`.

        Raises:
            FloatingPointError: a log-prob is not finite. Another pair of the same batch may be the cause: a
                masked token contributes 0 times its value, which is not a number if the value is infinite.
        """
        budget = self.config.score.tokens_per_batch
        scores = reference_scores(self.model, prefix_groups(pairs), self.unconditional, budget, progress)
        columns: dict[str, Any] = {name: values.numpy() for name, values in scores.items()}
        columns |= {"pair_id": pairs["pair_id"], "group": pairs["group"]}
        columns["ches"] = pa.array(columns["ches"], from_pandas=True)
        return pa.table(columns, schema=SCORE_SCHEMA)


def reference_scores(
    model: LogpsModel,
    pairs: PrefixGroups,
    unconditional: list[int],
    tokens_per_batch: int,
    progress: Progress = _unseen,
) -> dict[str, torch.Tensor]:
    """The columns of numbers of SCORE_SCHEMA by name, on the CPU, shape (pairs,); CHES is NaN if unknown.

    Raises:
        FloatingPointError: a log-prob is not finite; see `ReferenceScorer.score`.
    """
    logps, ches_values = reference_logps(model, pairs, unconditional, tokens_per_batch, progress)
    if not torch.stack(list(logps.values())).isfinite().all():
        dtype = str(model.model.dtype).removeprefix("torch.")
        raise FloatingPointError(f"a log-prob is not finite with model.dtype={dtype}")
    scores = dict(zip(TOKEN_COLUMNS, torch.from_numpy(pairs.lengths).unbind(1), strict=True)) | logps
    for side in ("chosen", "rejected"):
        scores[f"mi_{side}"] = mutual_information(
            logps[f"ref_{side}_logps"], logps[f"uncond_{side}_logps"], scores[f"{side}_tokens"]
        )
    return scores | {"ches": ches_values}


@torch.inference_mode()
def reference_logps(
    model: LogpsModel,
    pairs: PrefixGroups,
    unconditional: list[int],
    tokens_per_batch: int,
    progress: Progress = _unseen,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The four sums of log-probs of every pair, by column name, in nats, and CHES, NaN if it is unknown.

    All are float32 on the CPU, shape (pairs,). When memory runs out, the remaining batches are planned again
    with half the tokens.

    `progress` is called after each forward; a pair that was forwarded with its query alone counts by the
    share of its tokens.
    """
    behind = pairs.behind(unconditional)
    done, tokens = 0, [model.layout.tokens(groups.lengths) for groups in (pairs, behind)]
    pairs_per_token = len(pairs) / sum(int(each.sum()) for each in tokens)
    order: list[int] = []
    ref, alike, uncond = [], [], []
    for batch, (logps, states) in _forwarded(model, pairs, tokens_per_batch, means=True):
        order += batch
        done += int(tokens[0][batch].sum())
        progress(done * pairs_per_token)
        ref.append(logps.view(-1, 2))
        alike.append(ches(*states.unflatten(0, (-1, 2)).unbind(1)))
    ref_chosen, ref_rejected = _in_place(order, ref).unbind(1)
    ches_values, order = _in_place(order, alike), []
    for batch, logps in _forwarded(model, behind, tokens_per_batch):
        order += batch
        done += int(tokens[1][batch].sum())
        progress(done * pairs_per_token)
        uncond.append(logps)
    uncond_chosen, uncond_rejected = _in_place(order, uncond).view(-1, 2).unbind(1)
    return {
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
        "uncond_chosen_logps": uncond_chosen,
        "uncond_rejected_logps": uncond_rejected,
    }, ches_values


def _forwarded(
    model: LogpsModel, groups: PrefixGroups, tokens_per_batch: int, means: bool = False
) -> Iterator[tuple[list[int], Any]]:
    """Indices and outputs of the groups of each batch; a thread packs the next one meanwhile."""
    lengths = model.layout.tokens(groups.lengths).tolist()
    batches = length_sorted_batches(lengths, tokens_per_batch)
    while batches:
        packed = made_ahead(lambda batch: _packed(model, groups[batch]), batches)
        for number, (batch, rows) in enumerate(zip(batches, packed, strict=True)):
            outputs = _forward_within_memory(model, rows, means, alone=len(batch) == 1)
            if outputs is None:
                batches = _replanned_with_half_the_tokens(batches[number:], lengths)
                break
            yield batch, outputs
        else:
            return


def _in_place(order: list[int], parts: list[torch.Tensor]) -> torch.Tensor:
    """Values of all batches on the host: each at its index, which `order` holds.

    They are copied at once, for each copy waits until the device has done all that it was given.
    """
    values = torch.cat(parts).cpu()
    placed = torch.empty_like(values)
    placed[order] = values
    return placed


def _packed(model: LogpsModel, groups: PrefixGroups) -> Batch:
    """The rows of a batch, in pinned memory where the model is on a GPU."""
    batch = model.layout.pack(groups)
    return batch.pinned() if model.model.device.type == "cuda" else batch


def _forward_within_memory(model: LogpsModel, batch: Batch, means: bool, alone: bool) -> Any:
    """The model's outputs; None if memory does not suffice, an exception if the group is `alone`."""
    try:
        return model(batch, means=means)
    except (RuntimeError, MemoryError) as error:
        if alone or not out_of_memory(error):
            raise
    # Outside the handler: the exception keeps the frames alive, and the frames keep the tensors.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _replanned_with_half_the_tokens(batches: list[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    """The same indices in batches of at most half the tokens of the first batch."""
    rest = [index for batch in batches for index in batch]
    budget = lengths[rest[0]] * len(batches[0]) // 2
    smaller = length_sorted_batches([lengths[index] for index in rest], budget)
    return [[rest[place] for place in batch] for batch in smaller]
