"""B-DPO training: one worker's step and loop, without Ray.

The launcher (Ray Train in `pipelines.train`, or plain processes) starts the process group and says what
becomes of a checkpoint. No reference model is ever loaded: what it said of every pair is in the scores.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from bdpo.config import Config, TrainConfig
from bdpo.errors import UserError
from bdpo.method.base import LossOutput, PairLogps
from bdpo.models.adapters import export_merged
from bdpo.storage.cache import local_copy
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.paths import atomic_folder
from bdpo.storage.run_dir import RunDir
from bdpo.training.batches import TrainingPlan, deal_micro_batches
from bdpo.training.checkpoints import (
    Checkpoint,
    Metrics,
    Report,
    Reported,
    Staging,
    TrainProgress,
    load_first_intact,
    save_checkpoint,
)
from bdpo.training.engine import build_engine, export
from bdpo.training.pairs import TrainingPairs
from bdpo.training.rungs import Rungs

# How far the loss may be off before the first update: two passes of the same weights round differently, and
# the sum over a response's tokens is off by the root of their number.
STEP_0_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def train(
    config: Config,
    run: RunDir,
    scores: pa.Table,
    reported: Callable[[], Sequence[Reported]],
    report: Report,
    rungs: Rungs | None = None,
) -> None:
    """Train to the last step, from the newest whole checkpoint, then write the model to `run.model`.

    With LoRA the adapter goes to `run.adapter` first, and `run.model` is the base with it merged in.

    Called by every worker of an initialised process group. `report` gets a folder with this worker's
    part of a checkpoint, which it removes, and the metrics of its step; `reported` waits until all that
    was reported counts as a checkpoint and returns what is kept of it. At each of `rungs` there is a
    checkpoint, the model is handed over, and training waits whether it is to go on.

    Raises:
        UserError: policy and reference differ before the first step; none of the checkpoints is whole or
            they are of another number of workers; the disk is full.
        FloatingPointError: a loss or a gradient is not finite; the message names the pairs.
    """
    pairs, held_out = TrainingPairs.load(config, run, scores).split()
    plan = TrainingPlan(pairs.lengths, config.train, config.seed)
    engine = build_engine(config, plan.total_steps, plan.warmup_steps)
    staging, log = Staging(run), MetricsLog(run.metrics)
    cursor = _resume(engine, run, log, reported)
    while cursor.step < plan.total_steps:
        if rungs and cursor.step in rungs.steps and not _at_rung(engine, pairs, run, rungs, cursor.step):
            return
        started = time.perf_counter()
        metrics = train_step(engine, pairs, plan, cursor.step)
        tokens = pairs.tokens(plan.global_batch(cursor.step))
        step = cursor.step + 1
        cursor = TrainProgress(step, step / plan.steps_per_epoch, cursor.num_tokens + tokens)
        metrics |= asdict(cursor) | {"tokens_per_second": tokens / (time.perf_counter() - started)}
        last, at_rung = step == plan.total_steps, rungs is not None and step in rungs.steps
        if held_out and (last or at_rung or step % config.train.eval_steps == 0):
            metrics |= evaluate(engine, held_out)
        if dist.get_rank() == 0:
            log.append(metrics)
        if last or at_rung or step % config.train.save_steps == 0:
            reported()  # one checkpoint at a time is on its way to storage
            log.flush()
            save_checkpoint(engine, cursor, metrics, staging, report)
    if config.train.load_best_model_at_end:
        load_first_intact(engine, best_first(config.train, reported()))
    _export(engine, pairs, run)


def train_step(engine: Any, data: TrainingPairs, plan: TrainingPlan, step: int) -> Metrics:
    """One optimizer step on the global batch of `step`; returns its metrics, the same on every worker."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    # Dropout, which LoRA may have, is a function of the step too: a resumed training draws the same.
    torch.manual_seed(int(np.random.default_rng([plan.seed, step, rank]).integers(2**63)))
    micro_batches = plan.micro_batches(step, workers)[rank]
    pairs_of_step = plan.global_batch(step)
    learning_rate = engine.get_lr()[0]
    sums: dict[str, torch.Tensor] = {}
    for number, indices in enumerate(micro_batches, start=1):
        pairs, output = _loss(engine, data, indices or pairs_of_step[:1])
        # The engine averages gradients over workers; the loss is a mean over the global batch.
        scale = workers / len(pairs_of_step) if indices else 0.0
        if number == 1 and step == 0:
            _require_initial_loss(pairs, output, data.config)
        engine.set_gradient_accumulation_boundary(number == len(micro_batches))
        engine.backward(output.loss.sum() * scale)
        engine.step()
        _add(sums, output, bool(indices))
    grad_norm = float(engine.get_global_grad_norm())
    # DeepSpeed leaves the weights as they are then, on every worker, and would go on with the next step.
    if not (engine.was_step_applied() and math.isfinite(grad_norm)):
        raise FloatingPointError(f"the gradient of step {step} is not finite: {data.names(pairs_of_step)}")
    return {**_means(sums, len(pairs_of_step)), "grad_norm": grad_norm, "learning_rate": learning_rate}


@torch.no_grad()
def evaluate(engine: Any, data: TrainingPairs) -> Metrics:
    """Metrics of held-out pairs, prefixed with `eval_`, the same on every worker."""
    rank, workers, rows = dist.get_rank(), dist.get_world_size(), list(range(data.table.num_rows))
    sums: dict[str, torch.Tensor] = {}
    engine.eval()
    for indices in deal_micro_batches(rows, data.lengths, data.config.train.tokens_per_micro_batch, workers)[
        rank
    ]:
        _, output = _loss(engine, data, indices or rows[:1])
        _add(sums, output, bool(indices))
    engine.train()
    metrics = {f"eval_{name}": mean for name, mean in _means(sums, len(rows)).items()}
    best = data.config.train.best_metric
    if best and best not in metrics:
        raise UserError(f"train.metric_for_best_model={best}: there are {', '.join(sorted(metrics))}")
    return metrics


def best_first(train: TrainConfig, reported: Sequence[Reported]) -> list[Checkpoint]:
    """Checkpoints by `metric_for_best_model`, the best one first, of equals the newest."""
    metric, sign = train.best_metric, 1 if train.best_is_greatest else -1
    by_score = sorted(reported, key=lambda r: (sign * r.metrics[metric], r.metrics["step"]))  # type: ignore[index]
    return [r.checkpoint for r in reversed(by_score)]


def _resume(
    engine: Any, run: RunDir, log: MetricsLog, reported: Callable[[], Sequence[Reported]]
) -> TrainProgress:
    """Go on from the newest whole checkpoint and note that, or begin if there is none."""
    newest_first = sorted(reported(), key=lambda r: r.metrics["step"], reverse=True)
    cursor, name = TrainProgress(), None
    damaged: dict[str, str] = {}
    logged = log.read()
    dist.barrier()  # before the first worker shortens the log
    if newest_first:
        cursor, name, damaged = load_first_intact(engine, [r.checkpoint for r in newest_first])
    if dist.get_rank() == 0:
        if newest_first or logged:
            reached = logged[-1]["step"] if logged else 0
            note = {"step": cursor.step, "reached": reached, "checkpoint": name, "damaged": damaged}
            MetricsLog(run.recoveries).append(note)
        log.keep(cursor.step)
    return cursor


def _loss(engine: Any, data: TrainingPairs, indices: Sequence[int]) -> tuple[PairLogps, LossOutput]:
    pairs = data.logps(engine, indices)
    output = data.config.method.loss(pairs)
    finite = torch.isfinite(output.loss)
    if not finite.all():
        bad = data.names(torch.tensor(indices)[~finite.cpu()].tolist())
        raise FloatingPointError(f"the loss is not finite: {bad}")
    return pairs, output


def _add(sums: dict[str, torch.Tensor], output: LossOutput, counts: bool) -> None:
    """Add a micro-batch to the sums over pairs, unless it only stood in for an empty one."""
    for name, values in {"loss": output.loss.detach(), **output.metrics}.items():
        sums[name] = sums.get(name, torch.zeros((), device=values.device)) + counts * values.sum()


def _means(sums: dict[str, torch.Tensor], pairs: int) -> Metrics:
    """Sums of every worker -> means over all pairs."""
    totals = torch.stack(list(sums.values())).double()
    dist.all_reduce(totals)
    return dict(zip(sums, (totals / pairs).tolist(), strict=True))


def _require_initial_loss(pairs: PairLogps, output: LossOutput, config: Config) -> None:
    """Before any update policy and reference are the same model, so every pair's loss is that of Δ = 0.

    That is ln 2 for DPO and all that differ from it by weights or by label smoothing.
    """
    method = config.method
    if not method.requires_reference:
        return
    same = replace(pairs, policy_chosen=pairs.reference_chosen, policy_rejected=pairs.reference_rejected)
    expected = method.loss(same).loss
    tokens = pairs.chosen_tokens + pairs.rejected_tokens
    allowed = STEP_0_TOLERANCE[config.model.dtype] * (method.beta * tokens.sqrt()).clamp(min=1)
    off, worst = ((output.loss.detach() - expected).abs() / expected.clamp(min=1) / allowed).max(0)
    if off > 1:
        raise UserError(
            f"before the first step the loss of {method.name} is {output.loss[worst]:.5g} instead of "
            f"{expected[worst]:.5g}: policy and reference differ; "
            "compare weights, dtype and chat_template with the fingerprint in scores/manifest.json"
        )


def _at_rung(engine: Any, data: TrainingPairs, run: RunDir, rungs: Rungs, step: int) -> bool:
    """Hand the model over, unless a training before this one did: somebody may be reading it."""
    if not _all_agree(rungs.exported(step)):
        _export(engine, data, run)
        dist.barrier()
        if dist.get_rank() == 0:
            rungs.mark_exported(step)
    return _all_agree(rungs.wait(step))


def _all_agree(answer: bool) -> bool:
    """Whether every worker says yes: what lies in storage is not seen by all at the same moment."""
    answers: list[bool] = [answer] * dist.get_world_size()
    dist.all_gather_object(answers, answer)
    return all(answers)


def _export(engine: Any, data: TrainingPairs, run: RunDir) -> None:
    """Write the model, whole or not at all; the first worker does, the others give it their parts.

    Of a model with LoRA the adapter comes first, and the base with it merged in is made from that.
    """
    first, lora = dist.get_rank() == 0, data.config.train.lora is not None
    with atomic_folder(run.adapter if lora else run.model) if first else nullcontext(Path()) as folder:
        export(engine, data.chat, folder)
    if lora and first:
        with atomic_folder(run.model) as folder:
            export_merged(data.config.model, local_copy(run.adapter), data.chat, folder)
