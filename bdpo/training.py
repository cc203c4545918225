"""B-DPO training: one worker's step and loop, without Ray.

The launcher (Ray Train in `pipelines.train`, or plain processes) starts the process group and says what
becomes of a checkpoint. No reference model is ever loaded: what it said of every pair is in the scores.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist

from bdpo.config import Config
from bdpo.data import read_pairs
from bdpo.logps import pair_logps, why_plain_rows
from bdpo.losses import LOSSES, LossOutput, PairLogps
from bdpo.mi import balance_weights
from bdpo.models import model_config
from bdpo.packing import tree_tokens
from bdpo.plan import TrainingPlan
from bdpo.rungs import Rungs
from bdpo.runs import MetricsLog, RunDir, discard
from bdpo.tokens import ChatTokenizer, encode_pairs, load_tokenizer
from bdpo.zero3 import build_engine, export

Metrics = dict[str, float]
Report = Callable[[Path, Metrics], None]

# |loss - ln 2| before the first update: rounding of two forward passes of the same weights.
STEP_0_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}


@dataclass(frozen=True)
class TrainingPairs:
    """Pairs and their scores, row by row the same; tensors have shape (pairs,)."""

    config: Config
    chat: ChatTokenizer
    table: pa.Table
    scores: pa.Table
    weight_chosen: torch.Tensor
    weight_rejected: torch.Tensor
    shared_rows: bool

    @classmethod
    def load(cls, config: Config, run: RunDir, scores: pa.Table) -> TrainingPairs:
        """Join scores with the prepared pairs and weigh them by `method`."""
        table = read_pairs(run.pairs, 0, scores.num_rows)
        if table["pair_id"] != scores["pair_id"]:
            raise RuntimeError(f"{run.scores}: not the scores of the pairs in {run.pairs}")
        weights = balance_weights(_column(scores, "mi_chosen"), _column(scores, "mi_rejected"), config.method)
        plain = why_plain_rows(model_config(config.model), config.data.max_length)
        return cls(config, load_tokenizer(config.model), table, scores, *weights, shared_rows=plain is None)

    @property
    def lengths(self) -> list[int]:
        """Padded tokens of each pair in the rows that the model takes."""
        parts = (self.scores[f"{part}_tokens"].to_pylist() for part in ("prompt", "chosen", "rejected"))
        return [tree_tokens(p, [c, r], self.shared_rows) for p, c, r in zip(*parts, strict=True)]

    def tokens(self, indices: Sequence[int]) -> int:
        """Real tokens of some pairs, the prompt counted once."""
        rows = self.scores.take(indices)
        return sum(sum(rows[f"{part}_tokens"].to_pylist()) for part in ("prompt", "chosen", "rejected"))

    def logps(self, model: Any, indices: Sequence[int]) -> PairLogps:
        """Forward the policy over some pairs and put the reference's log-probs beside its own."""
        pairs = encode_pairs(self.chat, self.table.take(indices).to_pylist(), self.config.data)
        policy_chosen, policy_rejected = pair_logps(model, pairs)
        scores, device = self.scores.take(indices), policy_chosen.device
        unsafe = {
            side: torch.tensor(
                [safe is False for safe in self.table[f"{side}_safe"].take(indices).to_pylist()]
            )
            for side in ("chosen", "rejected")
        }
        return PairLogps(
            policy_chosen,
            policy_rejected,
            *(
                values.to(device)
                for values in (
                    _column(scores, "ref_chosen_logps"),
                    _column(scores, "ref_rejected_logps"),
                    _column(scores, "chosen_tokens"),
                    _column(scores, "rejected_tokens"),
                    self.weight_chosen[indices],
                    self.weight_rejected[indices],
                    unsafe["chosen"],
                    unsafe["rejected"],
                )
            ),
        )


def train(
    config: Config,
    run: RunDir,
    scores: pa.Table,
    checkpoint: Path | None,
    report: Report,
    rungs: Rungs | None = None,
) -> None:
    """Train to the last step, from `checkpoint` if there is one, then write the model to `run.model`.

    Called by every worker of an initialised process group. `report` gets a folder with this worker's
    part of a checkpoint, which is removed when it returns, and the metrics of its step. At each of
    `rungs` there is a checkpoint, the model is handed over, and training waits whether it is to go on.

    Raises:
        RuntimeError: step-0 loss is not ln 2, or the checkpoint is of another number of workers.
        FloatingPointError: a loss is not finite; the message names the pairs.
    """
    data = TrainingPairs.load(config, run, scores)
    plan = TrainingPlan(data.lengths, config.train, config.seed)
    engine = build_engine(config, plan.total_steps)
    step, num_tokens = load_checkpoint(engine, checkpoint) if checkpoint else (0, 0)
    log = MetricsLog(run.metrics)
    if dist.get_rank() == 0:
        log.keep(step)
    while step < plan.total_steps:
        if rungs and step in rungs.steps and not _at_rung(engine, data.chat, run, rungs, step):
            return
        started = time.perf_counter()
        metrics = train_step(engine, data, plan, step)
        step += 1
        tokens = data.tokens(plan.global_batch(step - 1))
        num_tokens += tokens
        metrics |= {
            "step": step,
            "epoch": step / plan.steps_per_epoch,
            "num_tokens": num_tokens,
            "tokens_per_second": tokens / (time.perf_counter() - started),
        }
        if dist.get_rank() == 0:
            log.append(metrics)
        at_rung = rungs is not None and step in rungs.steps
        if step % config.train.save_steps == 0 or step == plan.total_steps or at_rung:
            save_checkpoint(engine, step, num_tokens, metrics, report)
    _export_whole(engine, data.chat, run)


def train_step(engine: Any, data: TrainingPairs, plan: TrainingPlan, step: int) -> Metrics:
    """One optimizer step on the global batch of `step`; returns its metrics, the same on every worker."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    micro_batches = plan.micro_batches(step, workers)[rank]
    pairs_of_step = plan.global_batch(step)
    learning_rate = engine.get_lr()[0]
    sums: dict[str, torch.Tensor] = {}
    for number, indices in enumerate(micro_batches, start=1):
        output = _loss(engine, data, indices or pairs_of_step[:1])
        # The engine averages gradients over workers; the loss is a mean over the global batch.
        scale = workers / len(pairs_of_step) if indices else 0.0
        if number == 1 and step == 0:
            _require_ln2(output, data.config)
        engine.set_gradient_accumulation_boundary(number == len(micro_batches))
        engine.backward(output.loss.sum() * scale)
        engine.step()
        for name, values in {"loss": output.loss.detach(), **output.metrics}.items():
            sums[name] = sums.get(name, torch.zeros((), device=values.device)) + bool(indices) * values.sum()
    totals = torch.stack(list(sums.values())).double()
    dist.all_reduce(totals)
    means = dict(zip(sums, (totals / len(pairs_of_step)).tolist(), strict=True))
    return {**means, "grad_norm": float(engine.get_global_grad_norm()), "learning_rate": learning_rate}


def save_checkpoint(engine: Any, step: int, num_tokens: int, metrics: Metrics, report: Report) -> None:
    """Every worker writes its part of the engine's state, and the cursor, to a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="bdpo-checkpoint-") as folder:
        cursor = {"step": step, "num_tokens": num_tokens, "workers": dist.get_world_size()}
        engine.save_checkpoint(folder, tag="state", client_state={"cursor": cursor})
        dist.barrier()
        report(Path(folder), metrics)


def load_checkpoint(engine: Any, folder: Path) -> tuple[int, int]:
    """Restore the engine and return the cursor: (steps done, tokens seen).

    Raises:
        RuntimeError: the checkpoint is incomplete or was made by another number of workers.
    """
    parts = len(list(folder.glob("state/*_optim_states.pt")))
    if parts != dist.get_world_size():
        raise RuntimeError(
            f"{folder}: a checkpoint of {parts} workers cannot be resumed by {dist.get_world_size()}; "
            f"set train.workers={parts}"
        )
    path, client_state = engine.load_checkpoint(str(folder), tag="state")
    if path is None:
        raise RuntimeError(f"{folder}: not a checkpoint that DeepSpeed can load")
    return client_state["cursor"]["step"], client_state["cursor"]["num_tokens"]


def _loss(engine: Any, data: TrainingPairs, indices: Sequence[int]) -> LossOutput:
    output = LOSSES[data.config.method.name](data.logps(engine, indices), data.config.method)
    finite = torch.isfinite(output.loss)
    if not finite.all():
        bad = data.table["pair_id"].take(torch.tensor(indices)[~finite.cpu()].tolist()).to_pylist()
        raise FloatingPointError(f"the loss of pairs {', '.join(bad)} is not finite")
    return output


def _require_ln2(output: LossOutput, config: Config) -> None:
    """Before any update policy and reference are the same model, so every pair's loss is ln 2."""
    off = (output.loss.detach() - math.log(2)).abs().max().item()
    if off > STEP_0_TOLERANCE[config.model.dtype]:
        raise RuntimeError(
            f"before the first step the loss is off ln 2 by {off:.2g}: policy and reference differ; "
            "compare model and data with the fingerprint in scores/manifest.json"
        )


def _at_rung(engine: Any, chat: ChatTokenizer, run: RunDir, rungs: Rungs, step: int) -> bool:
    """Hand the model over, unless a training before this one did: somebody may be reading it."""
    if not rungs.exported(step):
        _export_whole(engine, chat, run)
        dist.barrier()
        rungs.hand_over(step)
    return rungs.wait(step)


def _export_whole(engine: Any, chat: ChatTokenizer, run: RunDir) -> None:
    """Write the model under a temporary name, then rename: a folder `model` is always complete."""
    unfinished = run.root / ".model.unfinished"
    if dist.get_rank() == 0:
        discard(unfinished)
    export(engine, chat, unfinished)
    if dist.get_rank() == 0:
        discard(run.model)
        unfinished.rename(run.model)


def _column(table: pa.Table, name: str) -> torch.Tensor:
    return torch.from_numpy(table[name].to_numpy().copy()).float()
