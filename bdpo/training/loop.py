"""The training loop of one worker, without Ray: steps, evaluation, checkpoints, export.

The launcher (Ray Train in `pipelines.runtime.fit`, or plain processes) initialises the process group and
decides where checkpoints go. No reference model is ever loaded: the scores have its log-probs of every pair.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from bdpo.config import Config, TrainConfig
from bdpo.errors import UserError
from bdpo.method.base import LossOutput, PairLogps
from bdpo.models.logps import ROUNDING
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.run_dir import RunDir
from bdpo.training.batches import TrainingPlan, deal_micro_batches
from bdpo.training.checkpoints import TrainProgress, load_first_intact
from bdpo.training.engine import build_engine
from bdpo.training.export import export_model
from bdpo.training.launcher import Checkpoint, Launcher, Metrics, Phase, Reported
from bdpo.training.pairs import PackedPairs, Step, TrainingPairs
from bdpo.training.reestimation import OnlineBalance
from bdpo.training.rungs import Rungs
from bdpo.training.saving import CheckpointSaver


def train(
    config: Config,
    run: RunDir,
    scores: pa.Table,
    launcher: Launcher,
    rungs: Rungs | None = None,
) -> None:
    """Train from the newest intact checkpoint to the last step, then write the model to `run.model`.

    With LoRA the adapter is written to `run.adapter` first, and `run.model` is the base with it merged in.

    Every worker of an initialised process group must call this. At each of `rungs` the training writes a
    checkpoint, exports the model, and waits for the decision whether to resume.

    Raises:
        UserError: policy and reference differ before the first step; no checkpoint is intact; the
            disk is full.
        FloatingPointError: a loss or a gradient is not finite; the message names the pairs.
    """
    pairs, held_out = TrainingPairs.load(config, run, scores).split()
    plan = TrainingPlan(pairs.lengths, config.train, config.seed)
    engine = build_engine(config, plan.total_steps, plan.warmup_steps)
    log = MetricsLog(run.metrics)
    with CheckpointSaver(engine, run, config.train, launcher) as saver:
        balance = OnlineBalance(engine, pairs, plan, launcher)
        progress = _resume(engine, run, log, launcher.reported, balance)
        steps = balance.steps(progress.step)
        while progress.step < plan.total_steps:
            at_rung = rungs if rungs and progress.step in rungs.steps else None
            if at_rung and not _goes_on(engine, pairs, run, at_rung, progress.step, launcher):
                return
            work = next(steps)
            launcher.begins(Phase.STEP)
            started = time.perf_counter()
            metrics = train_step(engine, pairs, work)
            tokens = pairs.tokens(work.pairs)
            step = progress.step + 1
            progress = TrainProgress(step, step / plan.steps_per_epoch, progress.num_tokens + tokens)
            speed = {"tokens_per_second": tokens / (time.perf_counter() - started)}
            metrics |= asdict(progress) | speed | balance.metrics
            halts = step == plan.total_steps or (rungs is not None and step in rungs.steps)
            if held_out and (halts or step % config.train.eval_steps == 0):
                launcher.begins(Phase.EVALUATION)
                metrics |= evaluate(engine, held_out)
            if dist.get_rank() == 0:
                log.append(metrics)
            if saver.due(step) or halts:
                log.flush()
                saver.save(progress, metrics, balance.state)
            if halts:
                saver.finish()
    launcher.begins(Phase.EXPORT)
    if config.train.load_best_model_at_end:
        load_first_intact(engine, best_first(config.train, launcher.reported()))
    export_model(engine, pairs, run)


def train_step(engine: Any, data: TrainingPairs, step: Step) -> Metrics:
    """One optimizer step on a global batch; returns its metrics, the same on every worker."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    # LoRA may have dropout. Seeded by the step, a resumed training draws the same as an undisturbed one.
    torch.manual_seed(int(np.random.default_rng([data.config.seed, step.number, rank]).integers(2**63)))
    learning_rate = engine.get_lr()[0]
    sums: dict[str, torch.Tensor] = {}
    for number, packed in enumerate(step.micro_batches, start=1):
        pairs, output = _loss(engine, data, packed)
        # The loss is a mean over the global batch, while the engine averages gradients over the workers.
        scale = workers / len(step.pairs) if packed.counts else 0.0
        if number == 1 and step.number == 0:
            _require_reference(pairs, data.config)
        engine.set_gradient_accumulation_boundary(number == len(step.micro_batches))
        engine.backward(output.loss.sum() * scale)
        engine.step()
        _accumulate(sums, output, packed.counts)
    grad_norm = float(engine.get_global_grad_norm())
    # DeepSpeed would skip the update on every worker and continue with the next step, without an error.
    if not (engine.was_step_applied() and math.isfinite(grad_norm)):
        raise FloatingPointError(
            f"the gradient of step {step.number} is not finite: {data.names(step.pairs)}"
        )
    return {**_means(sums, len(step.pairs)), "grad_norm": grad_norm, "learning_rate": learning_rate}


@torch.no_grad()
def evaluate(engine: Any, data: TrainingPairs) -> Metrics:
    """Metrics of held-out pairs, prefixed with `eval_`, the same on every worker."""
    rank, workers, rows = dist.get_rank(), dist.get_world_size(), list(range(len(data)))
    sums: dict[str, torch.Tensor] = {}
    engine.eval()
    budget = data.config.train.tokens_per_micro_batch
    dealt = deal_micro_batches(rows, data.lengths.tolist(), budget, workers, data.layout)[rank]
    for packed in data.packed_ahead(dealt, instead=rows[:1]):
        _, output = _loss(engine, data, packed)
        _accumulate(sums, output, packed.counts)
    engine.train()
    return {f"eval_{name}": mean for name, mean in _means(sums, len(rows)).items()}


def best_first(train: TrainConfig, reported: Sequence[Reported]) -> list[Checkpoint]:
    """Checkpoints by `metric_for_best_model`, the best one first; of equal ones the newest."""
    metric, sign = train.best_metric, 1 if train.best_is_greatest else -1
    by_score = sorted(reported, key=lambda r: (sign * r.metrics[metric], r.metrics["step"]))  # type: ignore[index]
    return [r.checkpoint for r in reversed(by_score)]


def _resume(
    engine: Any,
    run: RunDir,
    log: MetricsLog,
    reported: Callable[[], Sequence[Reported]],
    balance: OnlineBalance,
) -> TrainProgress:
    """Restore the newest intact checkpoint and record the recovery; without checkpoints, begin at step 0."""
    newest_first = sorted(reported(), key=lambda r: r.metrics["step"], reverse=True)
    progress, name = TrainProgress(), None
    damaged: dict[str, str] = {}
    logged = log.read()
    dist.barrier()  # every worker has read the log before the first one shortens it
    if newest_first:
        restored = load_first_intact(engine, [r.checkpoint for r in newest_first])
        progress, name, damaged = restored.progress, restored.checkpoint, restored.damaged
        balance.restore(restored.further)
    if dist.get_rank() == 0:
        if newest_first or logged:
            reached = logged[-1]["step"] if logged else 0
            note = {"step": progress.step, "reached": reached, "checkpoint": name, "damaged": damaged}
            note["workers"] = dist.get_world_size()
            MetricsLog(run.recoveries).append(note)
        log.keep(progress.step)
    return progress


def _loss(engine: Any, data: TrainingPairs, packed: PackedPairs) -> tuple[PairLogps, LossOutput]:
    pairs = packed.logps(engine)
    output = data.config.method.loss(pairs)
    finite = torch.isfinite(output.loss)
    if not finite.all():
        bad = data.names(torch.tensor(packed.indices)[~finite.cpu()].tolist())
        raise FloatingPointError(f"the loss is not finite: {bad}")
    return pairs, output


def _accumulate(sums: dict[str, torch.Tensor], output: LossOutput, counts: bool) -> None:
    """Add a micro-batch to the sums over pairs, unless it stands in for an empty one (`counts` is False)."""
    for name, values in {"loss": output.loss.detach(), **output.metrics}.items():
        sums[name] = sums.get(name, torch.zeros((), device=values.device)) + counts * values.sum()


def _means(sums: dict[str, torch.Tensor], pairs: int) -> Metrics:
    """Means over all pairs, from the sums of every worker."""
    totals = torch.stack(list(sums.values())).double()
    dist.all_reduce(totals)
    return dict(zip(sums, (totals / pairs).tolist(), strict=True))


def _require_reference(pairs: PairLogps, config: Config) -> None:
    """Raise a UserError unless the policy is still the model that was scored, to rounding.

    Then every loss is that of Δ = 0: ln 2 for DPO and for every method that differs from it by weights or
    label smoothing. The log-probs are compared, since the rounding of a loss depends on method and beta.
    """
    if not config.method.requires_reference:
        return
    apart = torch.cat(
        [
            (pairs.policy_chosen.detach() - pairs.reference_chosen).abs() / pairs.chosen_tokens.sqrt(),
            (pairs.policy_rejected.detach() - pairs.reference_rejected).abs() / pairs.rejected_tokens.sqrt(),
        ]
    )
    if (distance := float(apart.max())) > ROUNDING[config.model.dtype]:
        raise UserError(
            f"before the first step policy and reference differ by {distance:.3g} nats per root token, more "
            f"than the {ROUNDING[config.model.dtype]:g} that {config.model.dtype} explains; compare weights, "
            "dtype and chat_template with the fingerprint in scores/manifest.json"
        )


def _goes_on(
    engine: Any, data: TrainingPairs, run: RunDir, rungs: Rungs, step: int, launcher: Launcher
) -> bool:
    """Export the model for whoever evaluates it, and wait for the decision; every worker must call this.

    The model is not exported again if an earlier process of this training did: somebody may be reading it.
    """
    launcher.begins(Phase.EXPORT)
    if not _all_agree(rungs.exported(step)):
        export_model(engine, data, run, probe=step == rungs.steps[0])
        dist.barrier()
        if dist.get_rank() == 0:
            rungs.mark_exported(step)
    launcher.begins(Phase.DECISION)
    return _all_agree(rungs.wait(step))


def _all_agree(answer: bool) -> bool:
    """Whether the answer is True on every worker: not all see a change of the storage at the same moment."""
    answers: list[bool] = [answer] * dist.get_world_size()
    dist.all_gather_object(answers, answer)
    return all(answers)
