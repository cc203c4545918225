"""One gloo process of a training without Ray, with checkpoints in <run_dir>/checkpoints/<step>.

`tests.support.training` forks these processes from a server that has imported this module: to import torch
and DeepSpeed takes longer than the trainings of the tests. So the module also imports `LATER`, what a
training would import in its course.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # which DeepSpeed reads when it is imported

import pyarrow.parquet as pq
import torch
import torch._dynamo

from bdpo.config import load_config
from bdpo.errors import UserError
from bdpo.models.deepspeed_internals import import_deepspeed
from bdpo.storage.run_dir import RunDir
from bdpo.training import loop as training
from bdpo.training.rungs import Rungs

NO_LIMIT = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

LATER = [
    "deepspeed.runtime.zero.stage3",
    "detect_secrets.plugins",
    "peft",
    "pyarrow.dataset",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.optimization",
]

import_deepspeed()
for each in LATER:
    importlib.import_module(each)
gc.freeze()  # so that no process looks for garbage, or for parameters, among what was imported

build_engine = training.build_engine


class Reported:
    """A checkpoint in the list of those that were reported, as Ray Train gives them."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint, self.path = self, str(folder)
        self.metrics = json.loads((folder / "metrics.json").read_text())

    def as_directory(self) -> contextlib.nullcontext[str]:
        """The folder itself."""
        return contextlib.nullcontext(self.path)


def work(environment: dict[str, str], files: Sequence[str], rungs: Sequence[int], log: str) -> None:
    """Train each of the configs, one after the other, in a process group that `environment` describes."""
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", environment["RENDEZVOUS"], rank=rank, world_size=size)
    for file in files:
        train_one(file, rungs)


def train_one(file: str, rungs: Sequence[int]) -> None:
    """Run <run_dir>/fault.py, then train; what stopped the training is in <run_dir>/error-<rank>.txt."""
    config, rank = load_config(file), torch.distributed.get_rank()
    run = RunDir(config.run_dir)
    checkpoints, fault = run.root / "checkpoints", run.root / "fault.py"

    def reported() -> list[Reported]:
        torch.distributed.barrier()
        return [Reported(folder) for folder in checkpoints.glob("*")]

    def report(folder: Path, metrics: dict[str, Any]) -> None:
        shutil.copytree(folder, checkpoints / str(metrics["step"]), dirs_exist_ok=True)
        shutil.rmtree(folder)
        if rank == 0:  # the workers report their own times: two writers would mix their lines
            (checkpoints / str(metrics["step"]) / "metrics.json").write_text(json.dumps(metrics))

    try:
        if fault.exists():
            exec(fault.read_text(), {**globals(), "run": run, "rank": rank})
        scores = pq.read_table(run.root / "scores.parquet")
        stops = [Rungs(run.root / "rungs", rungs)] if rungs else []
        training.train(config, run, scores, training.Launcher(reported, report), *stops)
    except (UserError, FloatingPointError) as error:
        (run.root / f"error-{rank}.txt").write_text(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, NO_LIMIT)
        training.build_engine = build_engine
