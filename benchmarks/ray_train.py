"""What Ray Train adds to a step: `bdpo.training.loop` in a process of its own, and under Ray Train.

    python -m benchmarks.ray_train [--steps 40] [--rounds 3]

The sandbox, one worker, no checkpoints but the last. The two take turns; compared are medians of the steps'
seconds, the first five of each training left out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from bdpo.config import Config, load_config
from bdpo.data.pairs import count_pairs
from bdpo.sandbox import with_sandbox_files
from bdpo.scoring.scores import finish_scores, score_fingerprint
from bdpo.scoring.shard_scorer import ShardScorer
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.run_dir import RunDir
from benchmarks.common import write_section
from pipelines.prepare import Prepare
from pipelines.train import Train

CONFIG = Path(__file__).parents[1] / "pipelines" / "configs" / "sandbox.yaml"
WARM_UP = 5

BARE = """
import shutil, sys
import torch
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
from bdpo.config import load_config
from bdpo.sandbox import with_sandbox_files
from bdpo.scoring.scores import read_scores
from bdpo.storage.run_dir import RunDir
from bdpo.training.launcher import Launcher
from bdpo.training.loop import train

config = with_sandbox_files(load_config(sys.argv[1]))
run = RunDir(config.run_dir)
launcher = Launcher(lambda: [], lambda folder, metrics: shutil.rmtree(folder))
train(config, run, read_scores(config, run), launcher)
"""


def main() -> None:
    """Measure both in turns and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="bdpo-benchmark-") as folder:
        scored = _scored(Path(folder), arguments.steps)
        seconds: dict[str, list[float]] = {"bare": [], "ray": []}
        for number in range(arguments.rounds):
            for way, launch in (("bare", _bare), ("ray", _under_ray)):
                run = RunDir(Path(folder) / f"{way}-{number}")
                shutil.copytree(scored.run_dir, run.root)
                config = scored.model_copy(update={"run_dir": str(run.root)})
                run.record(config)
                launch(config, run)
                seconds[way] += _step_seconds(run)
    bare, ray = (statistics.median(seconds[way]) for way in ("bare", "ray"))
    rows = [
        "| steps | bare loop, ms | under Ray Train, ms | ratio |",
        "|---|---|---|---|",
        f"| {len(seconds['ray'])} | {bare * 1000:.0f} | {ray * 1000:.0f} | **{ray / bare:.3f}** |",
        "",
        f"Medians of wall-clock time over {arguments.rounds} trainings each, in turns, one worker; "
        f"load average {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores at the end.",
    ]
    print(*rows, sep="\n")
    write_section("Training: what Ray Train adds to a step", rows)


def _under_ray(config: Config, run: RunDir) -> None:
    Train(config, run).complete()


def _scored(folder: Path, steps: int) -> Config:
    """The sandbox's pairs, prepared and scored."""
    overrides = [f"run_dir={folder / 'scored'}", "train.workers=1", f"train.max_steps={steps}"]
    overrides += ["train.save_steps=100000", "train.report_to=[]"]
    config = with_sandbox_files(load_config(CONFIG, overrides))
    run = RunDir(config.run_dir)
    run.open(config)
    Prepare(config, run).complete()
    fingerprint = score_fingerprint(config, run)
    ShardScorer(config, run, fingerprint, "cpu")({"first": 0, "rows": count_pairs(run.pairs)})
    finish_scores(run, fingerprint, 0.0)
    return config


def _bare(config: Config, run: RunDir) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    subprocess.run(
        [sys.executable, "-c", BARE, str(run.config)],
        env=os.environ | alone | {"MASTER_PORT": str(port)},
        check=True,
    )


def _step_seconds(run: RunDir) -> list[float]:
    """Tokens of a step by its tokens per second."""
    rows = MetricsLog(run.metrics).read()
    tokens = [after["num_tokens"] - before["num_tokens"] for before, after in pairwise(rows)]
    return [count / row["tokens_per_second"] for count, row in zip(tokens, rows[1:], strict=True)][WARM_UP:]


if __name__ == "__main__":
    main()
