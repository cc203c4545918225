"""Balance weights that follow the policy: its mutual information is estimated in the course of a training.

The scores hold the mutual information under the reference. Here it is computed again with the weights that
the engine has at the time, as `bdpo.scoring` computes it: two forwards of every pair, behind its prompt and
behind no prompt. What is in force is part of each checkpoint, so a resumed training goes on with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bdpo.config import Config
from bdpo.method.mi import mutual_information, reestimate_of
from bdpo.models.ahead import made_ahead
from bdpo.models.packing import PrefixGroups
from bdpo.training.batches import TrainingPlan, deal_micro_batches
from bdpo.training.launcher import Launcher, Metrics, Phase
from bdpo.training.pairs import Step, TrainingPairs


class OnlineBalance:
    """The pairs of a training with the weights that are in force; every worker must call each method.

    Without `method.reestimate` these are the weights of the scores, from the first step to the last.
    """

    def __init__(self, engine: Any, scored: TrainingPairs, plan: TrainingPlan, launcher: Launcher) -> None:
        self.engine, self.plan, self.launcher = engine, plan, launcher
        self.reestimate = reestimate_of(scored.config.method)
        self.reference, self.pairs = scored.mi, scored
        self.metrics: Metrics = {}
        if self.reestimate:
            self.set(scored.mi)

    @property
    def mi(self) -> torch.Tensor | None:
        """The mutual information in force, (pairs, 2), nats per token; None if it is always the scores'."""
        return self.pairs.mi if self.reestimate else None

    def set(self, mi: torch.Tensor) -> None:
        """Make the weights of this mutual information, (pairs, 2), nats per token."""
        self.pairs = self.pairs.weighed_by(mi)
        chosen, rejected = mi.double().mean(0).tolist()
        drift = float((mi - self.reference).double().abs().mean())
        self.metrics = {"balance/mi_chosen": chosen, "balance/mi_rejected": rejected, "balance/drift": drift}

    def steps(self, first: int) -> Iterator[Step]:
        """The steps of the plan from this one on; before some of them the weights are made anew."""
        before = estimation_steps(self.pairs.config, self.plan)
        ends = [step for step in (*before, self.plan.total_steps) if step > first]
        for start, end in pairwise([first, *ends]):
            if start in before:
                self._estimate()
            yield from made_ahead(partial(self.pairs.step, self.plan), range(start, end))

    def _estimate(self) -> None:
        assert self.reestimate is not None  # noqa: S101
        mi = policy_mutual_information(self.engine, self.pairs, self.launcher)
        if self.reestimate.source == "mix":
            mi = (mi + self.reference) / 2
        kept = self.reestimate.momentum
        self.set(kept * self.pairs.mi + (1 - kept) * mi)


def estimation_steps(config: Config, plan: TrainingPlan) -> range:
    """The steps of the plan before which the mutual information is estimated again."""
    reestimate = reestimate_of(config.method)
    if reestimate is None:
        return range(0)
    every = plan.steps_per_epoch if reestimate.every == "epoch" else reestimate.every
    return range(every, plan.total_steps, every)


@torch.no_grad()
def policy_mutual_information(engine: Any, pairs: TrainingPairs, launcher: Launcher) -> torch.Tensor:
    """I(x;y) of both responses under the engine's weights: nats per token, float32, (pairs, 2), on the CPU.

    Every worker must call this and gets the same.

    Raises:
        FloatingPointError: it is not finite; the message names the pairs.
    """
    alone = pairs.groups.behind(pairs.chat.unconditional_ids(pairs.config.score.unconditional))
    engine.eval()
    conditional = _logps(engine, pairs, pairs.groups, launcher)
    unconditional = _logps(engine, pairs, alone, launcher).view(-1, 2)
    engine.train()
    mi = mutual_information(conditional, unconditional, torch.from_numpy(pairs.groups.lengths[:, 1:]))
    finite = mi.isfinite().all(1)
    if not finite.all():
        bad = pairs.names((~finite).nonzero().flatten().tolist())
        raise FloatingPointError(f"the mutual information under the policy is not finite: {bad}")
    return mi


def _logps(engine: Any, pairs: TrainingPairs, groups: PrefixGroups, launcher: Launcher) -> torch.Tensor:
    """Summed log-probs of all responses, nats, float32, (groups, responses); each worker forwards a share."""
    lengths, train = pairs.layout.tokens(groups.lengths), pairs.config.train
    order = np.argsort(-lengths, kind="stable")  # groups of about equal length: rows without padding
    values = torch.zeros(len(groups), groups.lengths.shape[1] - 1, device=engine.device)
    for start in range(0, len(order), train.global_batch_size):  # of which the dealing takes time
        launcher.begins(Phase.REESTIMATION)
        some = order[start : start + train.global_batch_size].tolist()
        workers, budget = dist.get_world_size(), train.tokens_per_micro_batch
        dealt = deal_micro_batches(some, lengths[some].tolist(), budget, workers, pairs.layout)
        mine = [batch or some[:1] for batch in dealt[dist.get_rank()]]
        packed = made_ahead(lambda batch: pairs.layout.pack(groups[batch]), mine)
        for batch, rows, counts in zip(mine, packed, map(bool, dealt[dist.get_rank()]), strict=True):
            values[batch] += counts * engine(rows).view(len(batch), -1)
    dist.all_reduce(values)  # a response is not zero on one worker alone
    return values.cpu()
