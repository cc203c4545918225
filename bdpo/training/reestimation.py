"""Balance weights that follow the policy: its mutual information is estimated in the course of a training.

The scores hold the mutual information under the reference. Here it is computed again with the weights that
the engine has at the time, as `bdpo.scoring` computes it: two forwards of every pair, behind its prompt and
behind no prompt. What is in force is part of each checkpoint, so a resumed training goes on with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bdpo.config import Config
from bdpo.errors import UserError
from bdpo.method.mi import mutual_information, reestimate_of
from bdpo.models.ahead import made_ahead
from bdpo.models.packing import Batch, PrefixGroups
from bdpo.training.batches import TrainingPlan, deal_micro_batches
from bdpo.training.launcher import Launcher, Metrics, Phase
from bdpo.training.pairs import Step, TrainingPairs

PIECE = 8
"""Micro-batches of each worker that are dealt at a time: enough that all are full and cost the same."""

NAMED = 10
"""Pairs that a message names."""


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
            self._weigh_by(scored.mi)

    @property
    def state(self) -> Mapping[str, Any]:
        """What a checkpoint holds of it; nothing where the weights are always those of the scores."""
        return {"balance": {"mi": self.pairs.mi, "pairs": self._digest()}} if self.reestimate else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with the weights of a checkpoint that has this `state`.

        Raises:
            UserError: the checkpoint is of other pairs, or of the same pairs in another order.
        """
        if self.reestimate is None:
            return
        if state["balance"]["pairs"] != self._digest():
            raise UserError(
                "the checkpoint has balance weights of other pairs than those that are trained on now: were "
                "the scores, by which data.select chooses pairs, made again? fresh=true starts over"
            )
        self._weigh_by(state["balance"]["mi"])

    def steps(self, first: int) -> Iterator[Step]:
        """The steps of the plan from this one on; before some of them the weights are made anew."""
        estimated_before = estimation_steps(self.pairs.config, self.plan)
        ends = [step for step in (*estimated_before, self.plan.total_steps) if step > first]
        for start, end in pairwise([first, *ends]):
            if start in estimated_before:
                self._estimate()
            yield from made_ahead(partial(self.pairs.step, self.plan), range(start, end))

    def _estimate(self) -> None:
        assert self.reestimate is not None  # noqa: S101
        mi = policy_mutual_information(self.engine, self.pairs, self.launcher)
        if self.reestimate.source == "mix":
            mi = (mi + self.reference) / 2
        kept = self.reestimate.momentum
        self._weigh_by(kept * self.pairs.mi + (1 - kept) * mi)

    def _weigh_by(self, mi: torch.Tensor) -> None:
        self.pairs = self.pairs.weighed_by(mi)
        chosen, rejected = mi.double().mean(0).tolist()
        drift = float((mi - self.reference).double().abs().mean())
        self.metrics = {"balance/mi_chosen": chosen, "balance/mi_rejected": rejected, "balance/drift": drift}

    def _digest(self) -> str:
        """SHA-256 of the ids of the pairs, in their order."""
        digest = hashlib.sha256()
        for chunk in self.pairs.ids.chunks:
            digest.update("\n".join([*chunk.to_pylist(), ""]).encode())
        return digest.hexdigest()


def estimation_steps(config: Config, plan: TrainingPlan) -> range:
    """The steps of the plan before which the mutual information is estimated again.

    Raises:
        UserError: `method.reestimate` is set, and there is no such step.
    """
    reestimate = reestimate_of(config.method)
    if reestimate is None:
        return range(0)
    every = plan.steps_per_epoch if reestimate.every == "epoch" else reestimate.every
    steps = range(every, plan.total_steps, every)
    if not steps:
        raise UserError(
            f"method.reestimate.every={reestimate.every}: the mutual information is never estimated again in "
            f"the {plan.total_steps} steps of this training ({plan.steps_per_epoch} an epoch); lower it, or "
            "raise train.num_train_epochs"
        )
    return steps


@torch.no_grad()
def policy_mutual_information(engine: Any, pairs: TrainingPairs, launcher: Launcher) -> torch.Tensor:
    """I(x;y) of both responses under the engine's weights: nats per token, float32, (pairs, 2), on the CPU.

    Every worker must call this and gets the same.

    Raises:
        FloatingPointError: it is not finite; the message names the pairs.
    """
    unconditional = pairs.chat.unconditional_ids(pairs.config.score.unconditional)
    mi = torch.empty(len(pairs), 2)
    engine.eval()
    for piece in _pieces(pairs):
        launcher.begins(Phase.REESTIMATION)
        groups = pairs.groups[piece]
        # Its tokens alone: `behind` copies all that its groups may look into, which is a mapped file here.
        alone = PrefixGroups.in_a_row(groups.tokens_in_order(), groups.lengths).behind(unconditional)
        given, by_itself = (_logps(engine, pairs, each).view(-1, 2) for each in (groups, alone))
        mi[piece] = mutual_information(given, by_itself, torch.from_numpy(groups.lengths[:, 1:]))
    engine.train()
    bad = (~mi.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise FloatingPointError(
            f"the mutual information under the policy is not finite for {len(bad)} of {len(pairs)} pairs, "
            f"among them {pairs.names(bad[:NAMED])}"
        )
    return mi


def _pieces(pairs: TrainingPairs) -> Iterator[np.ndarray]:
    """Indices of all pairs in pieces of about `PIECE` micro-batches a worker, of pairs of similar length.

    Their number depends on the workers alone, so that all of them have the same; all wait for each other
    after each.
    """
    order = np.argsort(-pairs.lengths, kind="stable")
    budget = PIECE * dist.get_world_size() * pairs.config.train.tokens_per_micro_batch
    number = pairs.lengths[order].cumsum() // budget
    yield from np.split(order, np.flatnonzero(np.diff(number)) + 1)


def _logps(engine: Any, pairs: TrainingPairs, groups: PrefixGroups) -> torch.Tensor:
    """Summed log-probs of all responses, nats, float32, on the CPU; each worker forwards its share."""
    lengths, everything = pairs.layout.tokens(groups.lengths).tolist(), list(range(len(groups)))
    budget, workers = pairs.config.train.tokens_per_micro_batch, dist.get_world_size()
    dealt = deal_micro_batches(everything, lengths, budget, workers, pairs.layout)[dist.get_rank()]
    forwarded = [batch or everything[:1] for batch in dealt]  # all workers run the same number of forwards

    def packed(batch: list[int]) -> Batch:
        rows = pairs.layout.pack(groups[batch])
        return rows.pinned() if torch.cuda.is_available() else rows

    logps = torch.zeros(len(groups), groups.lengths.shape[1] - 1, device=engine.device)
    for batch, own, rows in zip(forwarded, dealt, made_ahead(packed, forwarded), strict=True):
        logps[batch] += bool(own) * engine(rows).view(len(batch), -1)
    dist.all_reduce(logps)  # each is zero on all workers but one: the sum is exact
    return logps.cpu()
