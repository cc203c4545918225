"""The pairs of each optimizer step, and their distribution over the workers.

A global batch is a function of (seed, step) alone, whatever the number of workers. Every worker computes the
same plan from the same lengths, so nothing is communicated, and all workers run the same number of
micro-batches.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np

from bdpo.config import TrainConfig
from bdpo.errors import UserError

if TYPE_CHECKING:
    from bdpo.models.row_layout import RowLayout

CLOSE_TO_MEAN = 1.01
"""Costliest micro-batch / mean: once it is so close, more exchanges are not worth their time."""


def draw_held_out(pair_ids: Sequence[str], fraction: float, seed: int) -> list[int]:
    """Rows of the held-out pairs, which are only evaluated on: `fraction` of all, rounded up.

    The choice depends on the seed and the ids alone, not on the order of the rows.

    Raises:
        UserError: no pair would be left to train on.
    """
    count = count_held_out(len(pair_ids), fraction)
    rows = range(len(pair_ids)) if count else ()
    # Not sorted: of millions of pairs the digests alone would take gigabytes.
    return sorted(
        heapq.nsmallest(count, rows, key=lambda row: sha256(f"{seed}/{pair_ids[row]}".encode()).digest())
    )


def count_held_out(pairs: int, fraction: float) -> int:
    """How many pairs are held out: `fraction` of all, rounded up.

    Raises:
        UserError: no pair would be left to train on.
    """
    count = math.ceil(fraction * pairs)
    if fraction and count >= pairs:
        raise UserError(f"train.eval_fraction={fraction:g}: holds out all {pairs} pairs")
    return count


def plan_without_lengths(pairs: int, train: TrainConfig, seed: int) -> TrainingPlan:
    """The plan of a training on this number of pairs, held-out ones included: its steps, not its batches.

    Raises:
        UserError: see `count_held_out` and `TrainingPlan`.
    """
    # Only the number of lengths counts, and a range of any number takes no memory.
    return TrainingPlan(range(pairs - count_held_out(pairs, train.eval_fraction)), train, seed)


def deal_micro_batches(
    pairs: Sequence[int], lengths: Sequence[int], budget: int, workers: int, layout: RowLayout
) -> list[list[list[int]]]:
    """[worker][micro-step] -> some of `pairs`, the same number of micro-steps for every worker.

    `lengths` are the tokens of each of `pairs` in `layout`, `budget` is the greatest number of tokens of the
    grid of a micro-batch; a longer pair is alone. There are as few micro-steps as the budget allows, since
    each has a cost of its own. The workers wait for each other in every micro-step, so all micro-batches cost
    about the same operations. A worker without work gets an empty micro-batch: it still takes part in the
    collectives.
    """
    costs = [round(layout.cost([length])) for length in lengths]  # whole numbers: sums are exact
    if layout.shared:
        parts = _balanced_parts(lengths, costs, budget, workers, layout)
    else:
        parts = _contiguous_parts(lengths, costs, budget, workers)
    parts.sort(key=lambda part: -sum(costs[i] for i in part))
    dealt: list[list[list[int]]] = [[] for _ in range(workers)]
    for start in range(0, len(parts), workers):
        of_step = parts[start : start + workers]
        # In turns from the first and from the last worker, so that no worker has the costliest of each.
        if start // workers % 2:
            of_step.reverse()
        for worker, part in zip(dealt, of_step, strict=True):
            worker.append([pairs[i] for i in part])
    return dealt


def _balanced_parts(
    lengths: Sequence[int], costs: Sequence[int], budget: int, workers: int, layout: RowLayout
) -> list[list[int]]:
    """Indices in parts of about equal cost that fit the budget; as many for every worker.

    For shared rows, in which pairs of all lengths stand beside each other without padding.
    """
    # Fewer parts never fit: a part holds `budget` tokens at most, or one longer pair.
    count = workers * math.ceil(sum(min(length, budget) for length in lengths) / (workers * budget))
    while True:
        parts = _exchange(_costliest_to_the_emptiest(costs, count), costs)
        if all(layout.fits([lengths[i] for i in part], budget) for part in parts):
            return parts
        count += workers


def _costliest_to_the_emptiest(costs: Sequence[int], count: int) -> list[list[int]]:
    """Indices in `count` parts: costliest first, each to the part that costs least so far (Graham's rule)."""
    heap: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(count)]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        cost, number, part = heap[0]
        heapq.heapreplace(heap, (cost + costs[index], number, [*part, index]))
    return [part for _, _, part in heap]


def _exchange(parts: list[list[int]], costs: Sequence[int]) -> list[list[int]]:
    """Let the costliest part exchange an index with another, or give it one, until it is close to the mean.

    Graham's rule alone leaves some 6 % with four indices a part, exchanges 1 %. Each makes the greater one
    of two costs smaller, so they end.
    """
    loads = np.array([sum(costs[i] for i in part) for part in parts])
    while loads.max() > CLOSE_TO_MEAN * loads.sum() / len(loads):
        full = int(loads.argmax())
        found = _best_exchange(parts, loads, full, costs)
        if found is None:
            break
        other, given, taken = found
        parts[full].remove(given)
        parts[other].append(given)
        if taken >= 0:
            parts[other].remove(taken)
            parts[full].append(taken)
        moved = costs[given] - (costs[taken] if taken >= 0 else 0)
        loads[full] -= moved
        loads[other] += moved
    return parts


def _best_exchange(
    parts: list[list[int]], loads: np.ndarray, full: int, costs: Sequence[int]
) -> tuple[int, int, int] | None:
    """(other part, given, taken) after which the greater cost of the two parts is least; None if none helps.

    `taken` is -1 where nothing is taken. Of equal exchanges the first in this order. All are compared at
    once: hundreds of workers and thousands of pairs have a million exchanges.
    """
    # Every index of every part, and for each part one more that stands for nothing.
    others = np.repeat(np.arange(len(parts)), [len(part) + 1 for part in parts])
    taken = np.array([index for part in parts for index in (*part, -1)])
    given = np.array(parts[full])
    cost = np.array([*costs, 0])  # the last one for -1
    moved = cost[given][:, None] - cost[taken]
    room = loads[full] - loads[others]
    greater = np.where(
        (moved > 0) & (moved < room), loads[full] - np.minimum(moved, room - moved), loads[full]
    )
    least = greater.min()
    if least == loads[full]:
        return None
    rows, columns = np.nonzero(greater == least)
    return min((int(others[c]), int(given[r]), int(taken[c])) for r, c in zip(rows, columns, strict=True))


def _contiguous_parts(
    lengths: Sequence[int], costs: Sequence[int], budget: int, workers: int
) -> list[list[int]]:
    """The same for plain rows, which are padded to the longest: pairs of similar length are one part."""
    order = sorted(range(len(costs)), key=lambda index: -lengths[index])

    def cut(limit: int) -> list[list[int]]:
        parts: list[list[int]] = []
        for index in order:
            first, size = (parts[-1][0], len(parts[-1]) + 1) if parts else (index, 0)
            if size and size * costs[first] <= limit and size * lengths[first] <= budget:
                parts[-1].append(index)
            else:
                parts.append([index])
        return parts

    most = len(costs) * max(costs)
    count = workers * math.ceil(len(cut(most)) / workers)
    least = bisect_left(range(most), True, key=lambda limit: len(cut(limit)) <= count)
    parts = cut(least)
    return parts + [[] for _ in range(count - len(parts))]


@dataclass(frozen=True)
class TrainingPlan:
    """The order of training over pairs that cost `lengths` tokens each.

    Raises:
        UserError: the warmup takes all steps, so that the full learning rate is never reached.
    """

    lengths: Sequence[int] | np.ndarray
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
        order = _permutation(len(self.lengths), self.seed, epoch)
        drawn: list[int] = order[start : start + self.train.global_batch_size].tolist()
        return drawn

    def micro_batches(self, step: int, workers: int, layout: RowLayout) -> list[list[list[int]]]:
        """[worker][micro-step] -> indices of the pairs of a step, see `deal_micro_batches`."""
        pairs = self.global_batch(step)
        lengths = [int(self.lengths[i]) for i in pairs]
        return deal_micro_batches(pairs, lengths, self.train.tokens_per_micro_batch, workers, layout)


@lru_cache(maxsize=2)
def _permutation(pairs: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(pairs)
