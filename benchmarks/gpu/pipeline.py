"""The sandbox, end to end under Ray on one GPU: the processes that used the GPU, and the results.

`python -m benchmarks.gpu pipeline`. `pipelines.run` is started as a user starts it, with a whole GPU for the
scoring actor, the training worker and the evaluation actor, one after the other. That a process has the GPU
is seen from outside: it holds /dev/nvidia-uvm open, as a CUDA context does and Ray's own processes do not.
Scoring actors are found by the process ids in scores/manifest.json, the others by the titles that Ray gives
its workers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from bdpo.storage.manifests import read_manifest
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.paths import discard
from bdpo.storage.run_dir import RunDir
from benchmarks.gpu.record import Row, not_measured
from benchmarks.gpu.setup import Setup

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "pipelines" / "configs" / "sandbox.yaml"
CASES = ("float32", "bfloat16")
TITLES = {"scoring": "ShardScorer", "training": "TrainWorker", "evaluation": "ShardAnswerer"}
SMOKE = ["data.limit=40", "train.max_steps=2", "train.warmup_ratio=0", "evaluate.limit=4"]
SMOKE += ["evaluate.max_new_tokens=4"]


def measure(case: str, setup: Setup) -> Iterator[Row]:
    """A row for each stage."""
    run = RunDir(setup.work / f"sandbox-{case}")
    discard(run.root)
    gpus = 0 if setup.smoke else 1
    overrides = [f"run_dir={run.root}", f"model.dtype={case}", "train.workers=1"]
    overrides += [f"{section}.gpus_per_worker={gpus}" for section in ("score", "train", "evaluate")]
    command = [sys.executable, "-m", "pipelines.run", "--config", str(CONFIG), *overrides]
    seen = run_and_watch([*command, *(SMOKE if setup.smoke else [])], setup.out / f"pipeline-{case}.log")
    yield from stages(run, seen)


def run_and_watch(command: list[str], log: Path) -> dict[int, tuple[str, bool]]:
    """Run a command to its end; returns the title of each Ray worker below it, and whether it had the GPU.

    Raises:
        RuntimeError: it failed; its output is in `log`.
    """
    seen: dict[int, tuple[str, bool]] = {}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            for worker in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.Error, OSError, IndexError):
                    title = worker.cmdline()[0]
                    if title.startswith("ray::"):
                        _, before = seen.get(worker.pid, ("", False))
                        seen[worker.pid] = title, before or has_gpu(worker.pid)
            time.sleep(0.2)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}, see {log.name}")
    return seen


def has_gpu(pid: int) -> bool:
    """Whether a process has a CUDA context."""
    folder = f"/proc/{pid}/fd"
    return any(os.readlink(f"{folder}/{file}") == "/dev/nvidia-uvm" for file in os.listdir(folder))


def stages(run: RunDir, seen: dict[int, tuple[str, bool]]) -> Iterator[Row]:
    """The inputs, processes, duration and result of each stage."""
    config = json.loads((run.train / "manifest.json").read_text())["config"]
    report = json.loads((run.report / "summary.json").read_text())
    scores = read_manifest(run.scores / "manifest.json")
    scorers = {int(name.rpartition(":")[2]) for name in scores["workers"]} if scores else set()
    last = MetricsLog(run.metrics).read()[-1]
    safety = [
        report["evaluations"][name]["benchmarks"]["strongreject"]["safety"] for name in ("base", "trained")
    ]
    results = {
        "scoring": f"{scores['rows'] if scores else 0} pairs, scored by process {sorted(scorers)}",
        "training": f"{last['step']} steps, loss {last['loss']:.3f}",
        "evaluation": "StrongReject safety {:.0%}, then {:.0%}".format(*(s["value"] for s in safety)),
    }
    sections = {"scoring": "score", "training": "train", "evaluation": "evaluate"}
    for stage, section in sections.items():
        pids = {pid for pid, (title, _) in seen.items() if TITLES[stage] in title}
        pids = scorers if stage == "scoring" else pids
        spent = sum(s for name, s in report["seconds"].items() if name.split()[0] == section)
        yield {
            "stage": stage,
            "gpus_per_worker": config[section]["gpus_per_worker"],
            "processes": len(pids),
            "with_gpu": sum(seen.get(pid, ("", False))[1] for pid in pids),
            "titles": sorted({seen[pid][0] for pid in pids if pid in seen}),
            "seconds": spent,
            "result": results[stage],
        }
    others = [title for title, gpu in seen.values() if gpu and not any(t in title for t in TITLES.values())]
    yield {"stage": "other", "with_gpu": len(others), "titles": sorted(set(others))}


def table(rows: list[Row], machine: dict[str, Any]) -> list[str]:
    """For people."""
    lines = [
        "| model | stage | GPUs a worker | processes with the GPU | seconds | result |",
        "|---|---|---|---|---|---|",
    ]
    for row in (row for row in rows if "processes" in row):
        lines.append(
            f"| {row['case']} | {row['stage']} | {row['gpus_per_worker']:g} | {row['with_gpu']} of "
            f"{row['processes']} | {row['seconds']:.0f} | {row['result']} |"
        )
    others = sum(row["with_gpu"] for row in rows if row.get("stage") == "other")
    return [
        *lines,
        "",
        "A process has the GPU if it holds /dev/nvidia-uvm open, looked at five times a second; "
        f"{others} other processes of Ray's did.",
        "",
        *not_measured(rows),
    ]
