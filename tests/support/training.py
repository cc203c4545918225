"""Trainings in gloo processes of their own, without Ray."""

from __future__ import annotations

import multiprocessing.connection
import os
import shutil
import tempfile
import uuid
from pathlib import Path

import pyarrow.parquet as pq
from transformers import AutoModelForCausalLM

from bdpo.config import parse_config
from bdpo.data.pairs import read_pairs
from bdpo.scoring.reference import ReferenceScorer
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.run_dir import RunDir
from tests.support.architectures import tiny
from tests.support.forks import train_process
from tests.support.helpers import invented_pairs, save_model, tiny_config, write_jsonl
from tests.support.scored_run import prepared_run

PAIRS = 22  # 3 steps of 8, 8 and 6 pairs


def score(folder, chat, tied=False, dtype="float32", architecture=None):
    """The config of a run with prepared and scored pairs; of a tiny Qwen2 if no `architecture` is named."""
    model = save_model(folder / "model", chat, tied=tied)
    if architecture is not None:
        tiny(architecture).save_pretrained(model)
    data = write_jsonl(folder / "pairs.jsonl", invented_pairs(PAIRS))
    config = tiny_config(folder / "run", model, data)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    run = prepared_run(config)
    pq.write_table(
        ReferenceScorer(config, "cpu").score(read_pairs(run.pairs, 0, PAIRS)), run.root / "scores.parquet"
    )
    return config


def launch(configs, workers=1, rungs=(), may_stop=False):
    """Train in processes of their own, all exit codes being 0; `rungs` are steps to stand still at.

    Only a test that expects a training to stop with an error says `may_stop`, and reads its `errors`.
    The workers find each other by a file: a port that was free a moment ago may be another process's. When
    one of them fails, the others, which wait for it, are ended.
    """
    files = [str(Path(config.run_dir) / "config.yaml") for config in configs]
    for config, file in zip(configs, files, strict=True):
        Path(file).write_text(config.to_yaml())
    logs = [Path(configs[0].run_dir) / f"worker-{rank}.log" for rank in range(workers)]
    # torch does not decode a URL: the path must have no space and no bracket, as folders of tests have
    meeting = Path(tempfile.gettempdir()) / f"bdpo-rendezvous-{uuid.uuid4().hex}"
    group = {"RENDEZVOUS": f"file://{meeting}", "WORLD_SIZE": str(workers)}
    processes = []
    for rank, log in enumerate(logs):
        environment = {**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(train_process(environment, files, rungs, str(log)))
    try:
        for process in processes:
            process.start()
        waiting = list(processes)
        while waiting and not any(process.exitcode for process in processes):
            ended = multiprocessing.connection.wait([process.sentinel for process in waiting], timeout=1200)
            assert ended, "a training has not ended within 20 minutes"
            waiting = [process for process in waiting if process.sentinel not in ended]
    finally:
        for process in processes:
            process.kill()
            process.join()
        meeting.unlink(missing_ok=True)
    codes = [process.exitcode for process in processes]
    assert codes == [0] * workers, "\n".join(log.read_text() for log in logs)
    if not may_stop:
        stopped = {config.run_dir: errors(Path(config.run_dir)) for config in configs}
        assert not any(stopped.values()), stopped


def copied(scored, folder, checkpoints=(), **changes):
    """A copy of the scored run with some checkpoints in it; returns its changed config."""
    values = scored.model_dump() | {"run_dir": str(folder)}
    for section, keys in changes.items():
        other = "name" in keys and keys["name"] != values[section].get("name")
        values[section] = keys if other else values[section] | keys  # each method has keys of its own
    shutil.copytree(scored.run_dir, folder)
    for checkpoint in checkpoints:
        shutil.copytree(checkpoint, folder / "checkpoints" / checkpoint.name)
    return parse_config(values, "test")


def trained(scored, folder, workers=1, checkpoints=(), **changes):
    """Train a copy of the scored run with a changed config, in processes of its own; returns its folder."""
    launch([copied(scored, folder, checkpoints, **changes)], workers)
    return RunDir(folder)


def errors(folder):
    """What stopped a training, of each worker that it stopped."""
    return [file.read_text() for file in sorted(folder.glob("error-*.txt"))]


def metrics(run, name="loss"):
    return [row[name] for row in MetricsLog(run.metrics).read()]


def weights(run):
    return AutoModelForCausalLM.from_pretrained(run.model, dtype="float32").state_dict()


def results(config):
    run = RunDir(config.run_dir)
    return MetricsLog(run.metrics).read(), AutoModelForCausalLM.from_pretrained(run.model).state_dict()
