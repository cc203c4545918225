"""The pairs of each optimizer step, and their distribution over the workers.

A global batch is a function of (seed, step) alone, whatever the number of workers. Every worker computes the
same plan from the same lengths, so nothing is communicated, and all workers run the same number of
micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256

import numpy as np

from bdpo.config import TrainConfig
from bdpo.errors import UserError


def draw_held_out(pair_ids: Sequence[str], fraction: float, seed: int) -> list[int]:
    """Rows of the held-out pairs, which are only evaluated on: `fraction` of all, rounded up.

    The choice depends on the seed and the ids alone, not on the order of the rows.

    Raises:
        UserError: no pair would be left to train on.
    """
    count = math.ceil(fraction * len(pair_ids))
    if count >= len(pair_ids):
        raise UserError(f"train.eval_fraction={fraction:g}: holds out all {len(pair_ids)} pairs")
    drawn = sorted(range(len(pair_ids)), key=lambda row: sha256(f"{seed}/{pair_ids[row]}".encode()).digest())
    return sorted(drawn[:count])


def plan_without_lengths(pairs: int, train: TrainConfig, seed: int) -> TrainingPlan:
    """The plan of a training on this number of pairs, held-out ones included: its steps, not its batches.

    Raises:
        UserError: see `draw_held_out` and `TrainingPlan`.
    """
    out = draw_held_out([str(pair) for pair in range(pairs)], train.eval_fraction, seed)
    return TrainingPlan([0] * (pairs - len(out)), train, seed)


def deal_micro_batches(
    pairs: Sequence[int], lengths: Sequence[int], budget: int, workers: int
) -> list[list[list[int]]]:
    """[worker][micro-step] -> some of `pairs`, the same number of micro-steps for every worker.

    `lengths` are the tokens of each of `pairs`, `budget` is the greatest number of tokens of a micro-batch.
    The micro-batches of one micro-step cost about the same, since the workers wait for each other there. A
    worker without work gets an empty micro-batch: it still takes part in the collectives.
    """
    from bdpo.models.packing import length_sorted_batches

    batches = length_sorted_batches(lengths, budget)
    while len(batches) % workers:
        largest = max(batches, key=len)
        if len(largest) == 1:
            batches.append([])
            continue
        batches.remove(largest)
        batches += [largest[::2], largest[1::2]]
    batches.sort(key=lambda batch: -sum(lengths[i] for i in batch))
    return [[[pairs[i] for i in batch] for batch in batches[worker::workers]] for worker in range(workers)]


@dataclass(frozen=True)
class TrainingPlan:
    """The order of training over pairs that cost `lengths` tokens each.

    Raises:
        UserError: the warmup takes all steps, so that the full learning rate is never reached.
    """

    lengths: Sequence[int]
    train: TrainConfig
    seed: int

    def __post_init__(self) -> None:
        if 0 < self.warmup_steps >= self.total_steps:
            raise UserError(
                f"train.warmup_ratio={self.train.warmup_ratio:g}: the warmup takes all {self.total_steps} "
                "steps; lower it, or raise train.max_steps"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the last one may be smaller, no pair is dropped."""
        return math.ceil(len(self.lengths) / self.train.global_batch_size)

    @property
    def total_steps(self) -> int:
        """`max_steps`, else all steps of `num_train_epochs`."""
        return self.train.max_steps or self.steps_per_epoch * self.train.num_train_epochs

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        return round(self.train.warmup_ratio * self.total_steps)

    def global_batch(self, step: int) -> list[int]:
        """Indices of the pairs of a step: a slice of the epoch's permutation."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.train.global_batch_size
        return _permutation(len(self.lengths), self.seed, epoch)[start : start + self.train.global_batch_size]

    def micro_batches(self, step: int, workers: int) -> list[list[list[int]]]:
        """[worker][micro-step] -> indices of the pairs of a step, see `deal_micro_batches`."""
        pairs = self.global_batch(step)
        return deal_micro_batches(
            pairs, [self.lengths[i] for i in pairs], self.train.tokens_per_micro_batch, workers
        )


@lru_cache(maxsize=2)
def _permutation(pairs: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = np.random.default_rng([seed, epoch]).permutation(pairs).tolist()
    return order
