"""A run folder with random weights, prepared and scored by the code of the stages, without Ray."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch

from bdpo.config import Config, parse_config
from bdpo.data.pairs import count_pairs
from bdpo.models.transformers_private import attention_of_config
from bdpo.scoring.scores import finish_scores, read_scores, score_fingerprint, score_store
from bdpo.scoring.shard_scorer import ShardScorer
from bdpo.storage.manifests import read_manifest
from bdpo.storage.paths import discard
from bdpo.storage.run_dir import RunDir
from bdpo.training.batches import TrainingPlan
from bdpo.training.pairs import TrainingPairs
from benchmarks.common import MAX_LENGTH, MAX_PROMPT_LENGTH
from benchmarks.gpu.record import NotMeasured, Row
from benchmarks.gpu.setup import SEED, Clock, Setup, model_folder, pairs_file

SHARDS = 4  # the first of them warms up


def run_config(setup: Setup, name: str, pairs: int, **train: Any) -> Config:
    """B-DPO on one GPU with the defaults for what is not given here; the model of that name is made."""
    gpus = 0 if setup.smoke else 1
    values = {
        "run_dir": str(setup.work / f"run-{name}"),
        "seed": SEED,
        "model": {"name_or_path": str(model_folder(setup, name)), "dtype": "bfloat16"},
        "data": {
            "path": str(pairs_file(setup, pairs)),
            "max_length": MAX_LENGTH,
            "max_prompt_length": MAX_PROMPT_LENGTH,
        },
        "score": {"shard_rows": pairs // SHARDS, "gpus_per_worker": gpus},
        "train": {"gpus_per_worker": gpus, "global_batch_size": setup.pairs_a_step, "report_to": []} | train,
    }
    return parse_config(values, "benchmark")


def score(config: Config, setup: Setup) -> Row:
    """Prepare and score all pairs anew; returns what the scorer did after its first shard."""
    from pipelines.prepare import Prepare

    run = RunDir(config.run_dir)
    discard(run.root)
    run.open(config).release()
    Prepare(config, run).complete()
    fingerprint = score_fingerprint(config, run)
    scorer, clock = ShardScorer(config, run, fingerprint, setup.device.type), Clock(setup.device)
    for first, rows in score_store(run, fingerprint).missing(count_pairs(run.pairs), config.score.shard_rows):
        report = scorer({"first": first, "rows": rows})
        if report["rows"] != rows:
            raise RuntimeError(f"scoring: {report['stop'] or report['unscorable']}")
        clock.mark()
    seconds = clock.seconds()
    finish_scores(run, fingerprint, sum(seconds))
    pairs = config.score.shard_rows * len(seconds)
    attention = attention_of_config(scorer.scorer.model.model.config)
    return {"attention": attention, "pairs": pairs, "seconds_a_pair": sum(seconds) / pairs}


def scored(config: Config, case: str) -> TrainingPairs:
    """The pairs of a run folder that `score` has been over.

    Raises:
        NotMeasured: it has not.
    """
    run = RunDir(config.run_dir)
    if read_manifest(run.scores / "manifest.json") is None:
        raise NotMeasured(f"requires the case {case!r} before it")
    return TrainingPairs.load(config, run, read_scores(config, run))


def plan_of(data: TrainingPairs) -> TrainingPlan:
    """As `bdpo.training.loop.train` makes it."""
    return TrainingPlan(data.lengths, data.config.train, data.config.seed)


def start_process_group(setup: Setup) -> None:
    """Of this process alone, as Ray Train starts it for one worker."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo" if setup.smoke else "nccl")
