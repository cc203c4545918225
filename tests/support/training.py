"""Trainings in gloo processes of their own, without Ray."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
from transformers import AutoModelForCausalLM

from bdpo.config import parse_config
from bdpo.data.pairs import read_pairs
from bdpo.data.prepare import prepare
from bdpo.models.tokenizer import load_tokenizer
from bdpo.scoring.reference import ReferenceScorer
from bdpo.storage.run_dir import RunDir
from tests.support.helpers import invented_pairs, save_model, tiny_config, write_jsonl

PAIRS = 22  # 3 steps of 8, 8 and 6 pairs


# Trains each of the configs, one after the other, with checkpoints in <run_dir>/checkpoints/<step>. Runs
# <run_dir>/fault.py before, and writes what stopped a training to <run_dir>/error-<rank>.txt.
WORKER = """
import contextlib, json, resource, shutil, sys
from pathlib import Path
import pyarrow.parquet as pq, torch
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
from bdpo.training import loop as training
from bdpo.config import load_config
from bdpo.errors import UserError
from bdpo.storage.run_dir import RunDir

class Reported:
    def __init__(self, folder):
        self.checkpoint, self.path = self, str(folder)
        self.metrics = json.loads((folder / "metrics.json").read_text())
    def as_directory(self):
        return contextlib.nullcontext(self.path)

build_engine = training.build_engine
for file in sys.argv[1:]:
    config = load_config(file)
    run, rank = RunDir(config.run_dir), torch.distributed.get_rank()
    checkpoints, fault = run.root / "checkpoints", run.root / "fault.py"
    def reported():
        torch.distributed.barrier()
        return [Reported(folder) for folder in checkpoints.glob("*")]
    def report(folder, metrics):
        shutil.copytree(folder, checkpoints / str(metrics["step"]), dirs_exist_ok=True)
        shutil.rmtree(folder)
        if rank == 0:  # the workers report their own times: two writers would mix their lines
            (checkpoints / str(metrics["step"]) / "metrics.json").write_text(json.dumps(metrics))
    exec(fault.read_text() if fault.exists() else "")
    try:
        training.train(config, run, pq.read_table(run.root / "scores.parquet"), reported, report)
    except (UserError, FloatingPointError) as error:
        (run.root / f"error-{rank}.txt").write_text(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    training.build_engine = build_engine
"""


def score(folder, chat, tied=False):
    model = save_model(folder / "model", chat, tied=tied)
    data = write_jsonl(folder / "pairs.jsonl", invented_pairs(PAIRS))
    config = tiny_config(folder / "run", model, data)
    run = RunDir(config.run_dir)
    run.open(config)
    prepare(config.data, load_tokenizer(config.model), run.pairs, run.private, seed=0)
    pq.write_table(
        ReferenceScorer(config, "cpu").score(read_pairs(run.pairs, 0, PAIRS)), run.root / "scores.parquet"
    )
    return config


def launch(configs, workers=1):
    """Run WORKER in processes of its own, all exit codes being 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [Path(config.run_dir) / "config.yaml" for config in configs]
    for config, file in zip(configs, files, strict=True):
        file.write_text(config.to_yaml())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, *map(str, files)],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(workers)
    ]
    try:
        outputs = [process.communicate(timeout=1200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * workers, "\n".join(outputs)


def copied(scored, folder, checkpoints=(), **changes):
    """A copy of the scored run with some checkpoints in it; returns its changed config."""
    values = scored.model_dump() | {"run_dir": str(folder)}
    for section, keys in changes.items():
        values[section] = values[section] | keys
    shutil.copytree(scored.run_dir, folder)
    for checkpoint in checkpoints:
        shutil.copytree(checkpoint, folder / "checkpoints" / checkpoint.name)
    return parse_config(values, "test")


def trained(scored, folder, workers=1, checkpoints=(), **changes):
    """Train a copy of the scored run with a changed config, in processes of its own; returns its folder."""
    launch([copied(scored, folder, checkpoints, **changes)], workers)
    assert not errors(folder)
    return RunDir(folder)


def errors(folder):
    """What stopped a training, of each worker that it stopped."""
    return [file.read_text() for file in sorted(folder.glob("error-*.txt"))]


def metrics(run, name="loss"):
    return [json.loads(line)[name] for line in run.metrics.read_text().splitlines()]


def weights(run):
    return AutoModelForCausalLM.from_pretrained(run.model, dtype="float32").state_dict()


def results(config):
    run = RunDir(config.run_dir)
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return rows, AutoModelForCausalLM.from_pretrained(run.model).state_dict()
