"""Time and cost: how long each stage took, and the GPU-hours that it held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bdpo.config import Config, worker_range
from bdpo.reports.page import PageSection, PageTable
from bdpo.storage.manifests import read_facts, read_manifest
from bdpo.storage.paths import StoragePath, read_parquet
from bdpo.storage.run_dir import RunDir


@dataclass(frozen=True)
class TimedStage:
    """A stage, finished or not: its name, the manifest that records its seconds, the GPUs that it holds."""

    name: str
    manifest: StoragePath
    gpus: float


@dataclass(frozen=True)
class StageCost:
    """What finished work took: wall-clock seconds, on so many GPUs."""

    name: str
    seconds: float
    gpus: float

    @property
    def gpu_hours(self) -> float:
        """GPUs x hours."""
        return self.gpus * self.seconds / 3600


def stage_costs(stages: Sequence[TimedStage]) -> list[StageCost]:
    """The cost of each stage that is finished."""
    manifests = [(stage, read_facts(stage.manifest)) for stage in stages]
    return [
        StageCost(stage.name, found["seconds"], stage.gpus)
        for stage, found in manifests
        if "seconds" in found
    ]


def search_costs(config: Config, run: RunDir) -> list[StageCost]:
    """The cost of the sweep in a run folder: its trials, and the evaluations that they are compared with."""
    file = run.tune / "results.parquet"
    if not file.is_file():
        return []
    folders = {
        "base": run.search_base("search").eval("base"),
        "base, held out": run.search_base("held_out").eval("base"),
    }
    summary = read_manifest(run.tune / "summary.json")
    if summary is not None:
        folders["chosen, held out"] = run.part("tune", "trials", summary["best"]).eval("trained")
    stages = [
        TimedStage(f"search: evaluate {name}", folder / "summary.json", stage_gpus(config.evaluate))
        for name, folder in folders.items()
    ]
    trials = read_parquet(file).select(["train_seconds", "evaluate_seconds"])
    seconds = {name: float(np.sum(trials[name].to_numpy())) for name in trials.column_names}
    alone = config.evaluate.gpus_per_worker  # a trial evaluates in one process
    return [
        StageCost(
            f"search: train {trials.num_rows} trials", seconds["train_seconds"], stage_gpus(config.train)
        ),
        StageCost(f"search: evaluate {trials.num_rows} trials", seconds["evaluate_seconds"], alone),
        *stage_costs(stages),
    ]


def cost_section(costs: Sequence[StageCost]) -> PageSection | None:
    """Seconds and GPU-hours of finished work, and the sum of the GPU-hours."""
    if not costs:
        return None
    rows = [(cost.name, f"{cost.seconds:,.0f}", f"{cost.gpus:g}", f"{cost.gpu_hours:.2f}") for cost in costs]
    rows.append(("all", "", "", f"{sum(cost.gpu_hours for cost in costs):.2f}"))
    text = [
        "Each figure is that of the last command that worked on the stage: work that was done before a kill "
        "is not counted. Capability benchmarks are not counted either."
    ]
    return PageSection("Time and cost", text, [PageTable(("stage", "seconds", "GPUs", "GPU-hours"), rows)])


def stage_gpus(section: Any) -> float:
    """The most GPUs that the stage of a config section holds at a time."""
    return float(worker_range(section.workers)[1] * section.gpus_per_worker)
