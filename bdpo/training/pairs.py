"""The pairs that a training worker reads, joined with their scores and weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist

from bdpo.config import Config
from bdpo.data.formats.columns import LABELS
from bdpo.data.pairs import all_pairs
from bdpo.data.tokens import mapped_groups
from bdpo.method.base import PairLogps
from bdpo.models.ahead import made_ahead
from bdpo.models.loading import model_config
from bdpo.models.logps import BOTH, pair_logps
from bdpo.models.packing import Batch, PrefixGroups
from bdpo.models.row_layout import RowLayout, row_layout
from bdpo.models.tokenizer import ChatTokenizer, load_tokenizer
from bdpo.storage.run_dir import RunDir
from bdpo.training.batches import TrainingPlan, draw_held_out

SCORES = ("ref_chosen_logps", "ref_rejected_logps", "chosen_tokens", "rejected_tokens")
WEIGHTS = slice(len(SCORES), len(SCORES) + 2)
"""The columns of `known` that the method makes of mutual information."""


@dataclass(frozen=True)
class PackedPairs:
    """A micro-batch on the host: which pairs, their rows, and what is known of them before the forward.

    `known` is float32, (pairs, 8): the fields of PairLogps from `reference_chosen` on. A worker without pairs
    in a micro-step forwards one anyway, which does not count (`counts` is False): every worker has to take
    part in the collectives of ZeRO 3.
    """

    indices: list[int]
    batch: Batch
    responses: Sequence[str]
    known: torch.Tensor
    counts: bool

    def logps(self, model: Any) -> PairLogps:
        """Forward the policy; returns its log-probs together with those of the reference."""
        policy_chosen, policy_rejected = pair_logps(model, self.batch, self.responses)
        known = self.known.to(policy_chosen.device, non_blocking=True).unbind(1)
        unsafe = [label.bool() for label in known[-2:]]
        return PairLogps(*(policy_chosen, policy_rejected, *known[:-2], *unsafe))


@dataclass(frozen=True)
class Step:
    """What one worker forwards in an optimizer step: the `pairs` are those of all workers."""

    number: int
    pairs: list[int]
    micro_batches: list[PackedPairs]


@dataclass(frozen=True)
class TrainingPairs:
    """Pairs and what is known of them, row by row: no text, and token ids in a file that is mapped.

    `known` is float32, (pairs, 8), as in PackedPairs; unknown values are NaN. `mi` is the mutual information
    that its weights are made of, in nats per token, float32, (pairs, 2): chosen and rejected.
    """

    config: Config
    chat: ChatTokenizer
    layout: RowLayout
    ids: pa.ChunkedArray
    groups: PrefixGroups
    known: torch.Tensor
    mi: torch.Tensor

    @classmethod
    def load(cls, config: Config, run: RunDir, scores: pa.Table) -> TrainingPairs:
        """Join `scores` (of all or some of the prepared pairs) with the pairs; compute the method's weights.

        Raises:
            RuntimeError: a score belongs to no prepared pair.
            UserError: see `mapped_groups`.
        """
        table = all_pairs(run.pairs, ["pair_id", *LABELS])
        rows = pc.index_in(scores["pair_id"], table["pair_id"].combine_chunks())
        if rows.null_count:
            raise RuntimeError(f"{run.scores}: not the scores of the pairs in {run.pairs}")
        mi = [_column(scores[name]) for name in ("mi_chosen", "mi_rejected")]
        weights = config.method.weights(*mi)
        unsafe = (pc.equal(table[label], False).fill_null(False).take(rows) for label in LABELS)
        columns = [*(_column(scores[name]) for name in SCORES), *weights, *map(_column, unsafe)]
        responses = config.method.responses
        layout = row_layout(model_config(config.model), config.data.max_length, len(responses))
        groups = mapped_groups(run)[rows.to_numpy()]
        groups = groups.with_responses([BOTH.index(side) for side in responses])
        known = torch.stack(columns, dim=1)
        chat = load_tokenizer(config.model)
        return cls(config, chat, layout, scores["pair_id"], groups, known, torch.stack(mi, dim=1))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each pair with padding, int64, (pairs,), in the layout of rows that the model takes."""
        return self.layout.tokens(self.groups.lengths)

    def tokens(self, indices: Sequence[int]) -> int:
        """Real tokens that are forwarded of some pairs, the prompt counted once."""
        return int(self.groups.lengths[indices].sum())

    def names(self, indices: Sequence[int]) -> str:
        """Ids of some pairs, for a message."""
        return "pairs " + ", ".join(self.ids.take(indices).to_pylist())

    def split(self) -> tuple[TrainingPairs, TrainingPairs | None]:
        """(pairs to train on, held-out pairs or None)."""
        if not self.config.train.eval_fraction:
            return self, None
        out = draw_held_out(self.ids.to_pylist(), self.config.train.eval_fraction, self.config.seed)
        return self._take(np.delete(np.arange(len(self)), out)), self._take(np.array(out))

    def _take(self, rows: np.ndarray) -> TrainingPairs:
        known, mi = (values[torch.from_numpy(rows)] for values in (self.known, self.mi))
        return replace(self, ids=self.ids.take(rows), groups=self.groups[rows], known=known, mi=mi)

    def weighed_by(self, mi: torch.Tensor) -> TrainingPairs:
        """The same pairs with the weights that the method makes of another `mi`."""
        known = self.known.clone()
        known[:, WEIGHTS] = torch.stack(self.config.method.weights(*mi.unbind(1)), dim=1)
        return replace(self, known=known, mi=mi)

    def packed(self, indices: list[int], counts: bool = True) -> PackedPairs:
        """Some pairs as a micro-batch, in pinned memory where there is a GPU."""
        batch, responses = self.layout.pack(self.groups[indices]), self.config.method.responses
        known = self.known[torch.tensor(indices)]  # torch takes a list element by element
        packed = PackedPairs(indices, batch, responses, known, counts)
        if torch.cuda.is_available():
            return replace(packed, batch=packed.batch.pinned(), known=packed.known.pin_memory())
        return packed

    def packed_ahead(self, batches: Sequence[list[int]], instead: list[int]) -> Iterator[PackedPairs]:
        """The batches, packed by a thread; the pairs `instead` in the place of an empty one."""
        return made_ahead(lambda batch: self.packed(batch or instead, bool(batch)), batches)

    def step(self, plan: TrainingPlan, number: int) -> Step:
        """A step of the plan for this worker of the process group."""
        pairs = plan.global_batch(number)
        dealt = plan.micro_batches(number, dist.get_world_size(), self.layout)[dist.get_rank()]
        return Step(number, pairs, [self.packed(batch or pairs[:1], bool(batch)) for batch in dealt])


def _column(values: pa.ChunkedArray) -> torch.Tensor:
    return torch.from_numpy(values.to_numpy().astype(np.float32))
