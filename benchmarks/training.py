"""Training: operations of ours against TRL's DPOTrainer, same model, same pairs, same optimizer steps.

    python -m benchmarks.training [--pairs 64]

One global batch of all pairs. Leaves out the optimizer itself, and what Ray Train costs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bdpo.config import TrainConfig
from bdpo.method.base import PairLogps
from bdpo.method.losses import Bdpo
from bdpo.models.logps import LogpsModel, pair_logps
from bdpo.models.packing import PrefixGroups
from bdpo.models.row_layout import RowLayout
from bdpo.models.tokenizer import EncodedPair
from bdpo.scoring.reference import reference_logps
from bdpo.training.batches import TrainingPlan
from benchmarks.common import (
    MAX_LENGTH,
    TOKENS_PER_BATCH,
    cpu_seconds,
    data_sets,
    draw,
    flops,
    make_model,
    write_section,
)
from benchmarks.peer import trl_batches, trl_trainer
from benchmarks.scoring import EMPTY


def main() -> None:
    """Measure every data set and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=64)
    arguments = parser.parse_args()
    sets = data_sets(arguments.pairs)
    sets["long prompts (350), short responses (70), spread 0.3"] = draw(arguments.pairs, 330, 70, 0.3)
    rows = [
        "| data set | policy step / TRL | CPU time | scoring + 1 epoch / TRL live "
        "| scoring + 4 trials / 4 TRL | MI over own DPO |",
        "|---|---|---|---|---|---|",
        *(_row(name, pairs) for name, pairs in sets.items()),
        "",
        "Ratios of operations, but for CPU time of the policy step. TRL live: reference model beside the "
        "policy. MI over own DPO: what the unconditional terms add to scoring and one epoch.",
    ]
    print(*rows, sep="\n")
    write_section("Training", rows)


def _row(name: str, pairs: list[EncodedPair]) -> str:
    model = LogpsModel(make_model(), MAX_LENGTH)
    step = partial(our_step, model, pairs)
    ours, _ = flops(model.model, step)
    scoring, _ = flops(
        model.model, partial(reference_logps, model, PrefixGroups.of(pairs), EMPTY, TOKENS_PER_BATCH)
    )
    conditional, _ = flops(model.model, partial(our_conditional_pass, model, pairs))
    policy, trl_step = trl(pairs, live=False)
    trl_policy, _ = flops(policy, trl_step)
    trl_live, _ = flops(*trl(pairs, live=True))
    seconds = cpu_seconds({"ours": step, "TRL": trl_step})
    return (
        f"| {name} | **{ours / trl_policy:.3f}** | {seconds['ours'] / seconds['TRL']:.2f} "
        f"| **{(scoring + ours) / trl_live:.3f}** | **{(scoring + 4 * ours) / (4 * trl_live):.3f}** "
        f"| {(scoring - conditional) / (conditional + ours):.3f} |"
    )


def micro_batches(pairs: list[EncodedPair]) -> list[PrefixGroups]:
    """As the training plan cuts one global batch of all pairs, for one worker."""
    train = TrainConfig(global_batch_size=len(pairs), tokens_per_micro_batch=TOKENS_PER_BATCH)
    layout = RowLayout(make_model().config.hidden_size, shared=True)
    lengths = layout.tokens(PrefixGroups.of(pairs).lengths)
    dealt = TrainingPlan(lengths.tolist(), train, seed=0).micro_batches(0, 1, layout)
    return [PrefixGroups.of(pairs)[batch] for batch in dealt[0]]


def our_step(model: LogpsModel, pairs: list[EncodedPair]) -> None:
    """Forward and backward of B-DPO over the global batch, reference and policy the same as at step 0."""
    model.zero_grad()
    for batch in micro_batches(pairs):
        chosen, rejected = pair_logps(model, model.layout.pack(batch))
        one = torch.ones(len(batch))
        scored = PairLogps(chosen, rejected, chosen.detach(), rejected.detach(), one, one, one, one, one, one)
        output = Bdpo().loss(scored)
        (output.loss.sum() / len(pairs)).backward()


@torch.no_grad()
def our_conditional_pass(model: LogpsModel, pairs: list[EncodedPair]) -> None:
    """The reference pass of plain DPO."""
    for batch in micro_batches(pairs):
        pair_logps(model, model.layout.pack(batch))


def trl(pairs: list[EncodedPair], live: bool) -> tuple[Any, Callable[[], Any]]:
    """TRL's policy and its step over the pairs: with a live reference model, or with precomputed scores."""
    trainer = trl_trainer(make_model(), make_model() if live else None)
    policy = trainer.model.train()
    batches = list(trl_batches(pairs))
    if not live:
        for batch in batches:
            scores = trainer.compute_ref_log_probs(policy, batch)
            batch |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), scores, strict=True))

    def work() -> None:
        policy.zero_grad()
        for batch in batches:
            trainer.compute_loss(policy, dict(batch)).backward()

    return policy, work


if __name__ == "__main__":
    main()
