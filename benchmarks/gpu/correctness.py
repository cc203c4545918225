"""On CUDA: shared against plain rows, the loss before the first step, the export, a resume.

`python -m benchmarks.gpu correctness`. Rows are compared on layers of the 7B model's width, heads and
vocabulary: in float32 with plain rows in float32; in bfloat16 both with plain rows in float32 of the same
weights, and shared rows may be `TIMES` as far from those as plain rows are. The training is that of a
0.5B model.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bdpo.config import Config
from bdpo.data.pairs import prefix_groups, read_pairs
from bdpo.models.loading import load_model
from bdpo.models.logps import LogpsModel, pair_logps
from bdpo.models.packing import PrefixGroups
from bdpo.models.row_layout import RowLayout
from bdpo.models.transformers_private import attention_of_config
from bdpo.storage.run_dir import RunDir
from bdpo.training.checkpoints import TrainProgress, load_first_intact
from bdpo.training.engine import build_engine, export
from bdpo.training.launcher import Launcher
from bdpo.training.loop import train_step
from bdpo.training.pairs import TrainingPairs
from bdpo.training.saving import CheckpointSaver
from benchmarks.common import MAX_LENGTH
from benchmarks.gpu.record import Row, not_measured
from benchmarks.gpu.runs import plan_of, run_config, score, scored, start_process_group
from benchmarks.gpu.setup import Setup, random_model

ATTENTIONS = {"SDPA": "sdpa", "FlexAttention": "flex_attention"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TRAINING = "training"
CASES = (*(f"{dtype}, {attention}" for dtype in DTYPES for attention in ATTENTIONS), TRAINING)

LAYERS = 4
LOGPS_FLOAT32 = 1e-5  # nats a token, at most
GRADIENT_FLOAT32 = 1e-4  # of the gradient's norm
TIMES = 2.0
STEPS, RESUMED_AT, PAIRS_A_STEP = 6, 3, 16
STEP_0 = 1e-3
EXPORT = 1e-3  # nats a token: the same weights, in other batches


def measure(case: str, setup: Setup) -> Iterator[Row]:
    """Rows of a `value` and the `tolerance` that it is to stay within, if there is one."""
    if case == TRAINING:
        yield from training(setup)
    else:
        dtype, attention = case.split(", ")
        yield from rows_alike(setup, DTYPES[dtype], ATTENTIONS[attention])


def rows_alike(setup: Setup, dtype: torch.dtype, attention: str) -> Iterator[Row]:
    """Shared rows against plain ones: log-probs and gradients. On the CPU FlexAttention is SDPA."""
    groups = PrefixGroups.of(setup.pairs(4 if setup.smoke else 24))
    shape = setup.shape("7b", layers=2 if setup.smoke else LAYERS)
    shape.initializer_range = 2 / math.sqrt(shape.hidden_size)  # so that tokens choose whom they look at
    plain = LogpsModel(random_model(shape, dtype, setup.device), MAX_LENGTH)
    plain.layout = RowLayout(shape.hidden_size, shared=False)
    exact = Answers.of(copy.deepcopy(plain).float(), groups)
    kernel = "sdpa" if setup.smoke else attention
    shared = LogpsModel(random_model(shape, dtype, setup.device, kernel), MAX_LENGTH)
    logps, gradient = Answers.of(shared, groups).distance(exact)
    if dtype == torch.float32:
        tolerances = LOGPS_FLOAT32, GRADIENT_FLOAT32
    else:
        tolerances = tuple(TIMES * far for far in Answers.of(plain, groups).distance(exact))
    yield {"what": "log-probs, largest difference, nats/token", "value": logps, "tolerance": tolerances[0]}
    yield {"what": "gradient, difference over its norm", "value": gradient, "tolerance": tolerances[1]}


@dataclass(frozen=True)
class Answers:
    """Log-probs of the responses per token, and the gradient of their sum."""

    logps: torch.Tensor
    gradient: list[torch.Tensor]

    @classmethod
    def of(cls, model: LogpsModel, groups: PrefixGroups) -> Answers:
        """The log-probs of a model for the groups."""
        logps = model(model.layout.pack(groups))
        logps.sum().backward()
        tokens = logps.new_tensor(groups.lengths[:, 1:].reshape(-1))
        return cls(logps.detach() / tokens, [p.grad for p in model.parameters() if p.grad is not None])

    def distance(self, exact: Answers) -> tuple[float, float]:
        """(largest of log-probs, norm of the gradient's over the norm of the exact one)."""
        pairs = list(zip(self.gradient, exact.gradient, strict=True))
        off = math.sqrt(sum(float((a.float() - b).norm()) ** 2 for a, b in pairs))
        norm = math.sqrt(sum(float(b.norm()) ** 2 for _, b in pairs))
        return float((self.logps - exact.logps).abs().max()), off / norm


def training(setup: Setup) -> Iterator[Row]:
    """Score, train, checkpoint, export, load, resume; two undisturbed trainings show the chance."""
    batch = 4 if setup.smoke else PAIRS_A_STEP
    settings = {"global_batch_size": batch, "max_steps": STEPS, "learning_rate": 1e-5, "warmup_ratio": 0.0}
    config = run_config(setup, "0.5b", STEPS * batch, **settings)
    score(config, setup)
    start_process_group(setup)
    data, kept = scored(config, TRAINING), setup.work / "checkpoint-0.5b"
    engine, losses = trained(config, data, keep=kept)
    yield _row("loss before the first step, distance from ln 2", abs(losses[0] - math.log(2)), STEP_0)
    once = exported(engine, data, setup.work / "once")
    yield _row(
        "log-probs of the export over those of the engine, nats/token",
        export_off(engine, data, setup.work / "once"),
        EXPORT,
    )
    weights = [once]
    for start in (kept, None):
        del engine
        gc.collect()
        engine, _ = trained(config, data, start=start)
        weights.append(exported(engine, data, setup.work / "again"))
    apart = largest_difference(once, weights[2])
    yield _row("weights, two undisturbed trainings: largest difference", apart, None)
    yield _row(
        "weights, resumed against undisturbed: largest difference", largest_difference(*weights[:2]), apart
    )


def trained(
    config: Config, data: TrainingPairs, keep: Path | None = None, start: Path | None = None
) -> tuple[Any, list[float]]:
    """The engine after the last step, and the losses; a checkpoint is kept on the way, or begun from."""
    plan = plan_of(data)
    engine = build_engine(config, plan.total_steps, plan.warmup_steps)
    first = load_first_intact(engine, [Kept(str(start))]).progress.step if start else 0
    losses = []

    def report(folder: Path, _: dict[str, float]) -> None:
        assert keep is not None
        shutil.rmtree(keep, ignore_errors=True)
        shutil.move(folder, keep)

    launcher = Launcher(reported=list, report=report)
    with CheckpointSaver(engine, RunDir(config.run_dir), config.train, launcher) as saver:
        for step in range(first, plan.total_steps):
            if keep and step == RESUMED_AT:
                saver.save(TrainProgress(step), {}, {})
            losses.append(train_step(engine, data, data.step(plan, step))["loss"])
        saver.finish()
    return engine, losses


@dataclass(frozen=True)
class Kept:
    """A `bdpo.training.launcher.Checkpoint` in a folder."""

    path: str

    def as_directory(self) -> contextlib.AbstractContextManager[str]:
        """That folder."""
        return contextlib.nullcontext(self.path)


def exported(engine: Any, data: TrainingPairs, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the model that is written."""
    shutil.rmtree(folder, ignore_errors=True)
    export(engine, data.chat, folder)
    return {name: w for file in sorted(folder.glob("*.safetensors")) for name, w in load_file(file).items()}


@torch.no_grad()
def export_off(engine: Any, data: TrainingPairs, folder: Path) -> float:
    """How far what `from_pretrained` loads is from the engine, per token at most."""
    attention = attention_of_config(engine.module.model.config)
    loaded = LogpsModel(load_model(folder, data.config.model, attention), data.config.data.max_length)
    loaded = loaded.to(engine.device).eval()
    table = read_pairs(RunDir(data.config.run_dir).pairs, 0, PAIRS_A_STEP)
    pairs = prefix_groups(table)
    engine.eval()
    ours, theirs = (torch.stack(pair_logps(model, data.layout.pack(pairs)), 1) for model in (engine, loaded))
    tokens = ours.new_tensor(pairs.lengths[:, 1:])
    return float(((ours - theirs) / tokens).abs().max())


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of all weights of two models."""
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


def table(rows: list[Row], machine: dict[str, Any]) -> list[str]:
    """For people."""
    lines = ["| | what | measured | tolerance | |", "|---|---|---|---|---|"]
    for row in (row for row in rows if "what" in row):
        bound, value = row["tolerance"], row["value"]
        within = "" if bound is None else "within" if value <= bound else "**outside**"
        limit = "–" if bound is None else f"{bound:.1e}"
        lines.append(f"| {row['case']} | {row['what']} | {value:.1e} | {limit} | {within} |")
    return [
        *lines,
        "",
        f"Shared rows of {LAYERS} layers as wide as the 7B model's. In bfloat16 the tolerance is {TIMES:g} "
        "times the distance of plain rows from float32; of a resume, that of two undisturbed trainings.",
        "",
        *not_measured(rows),
    ]


def _row(what: str, value: float, tolerance: float | None) -> Row:
    return {"what": what, "value": value, "tolerance": tolerance}
