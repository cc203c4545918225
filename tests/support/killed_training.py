"""Trainings on a cluster of several nodes that are killed, and what the kills cost."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch

from bdpo.config import load_config
from bdpo.scoring.scores import read_scores
from bdpo.storage.metrics_log import MetricsLog
from tests.support import ROOT
from tests.support.helpers import invented_pairs, save_model, tiny_config, write_jsonl
from tests.support.ray_nodes import NOTICED_SOON, ON_DEMAND
from tests.support.scored_run import scored_run
from tests.support.training import launch

KILLS_OF_ONE_TRAINING = 4

# Every checkpoint is kept, so that those which were loaded can be compared afterwards.
DISTURBED = "train.save_total_limit=1000", "train.max_failures=-1"

TRAIN = {"workers": 2, "save_steps": 2, "num_train_epochs": 4}  # 12 steps


@dataclass
class Account:
    """What the kills cost."""

    kills: list[str] = field(default_factory=list)
    recovered: int = 0  # by the run itself, or by the same command
    lost_steps: int = 0  # done again
    refused: int = 0  # checkpoints that were found not to be whole
    partial: int = 0  # checkpoints that were loaded and are not those of the undisturbed run

    def __str__(self) -> str:
        return (
            f"{len(self.kills)} kills: {self.recovered} recovered, {self.lost_steps} steps done again, "
            f"{self.refused} partial checkpoints refused, {self.partial} partial checkpoints loaded"
        )


class Nodes:
    """A head without CPUs for the driver, and nodes of one CPU: as many as workers, and spare ones."""

    def __init__(self, workers: int, spare: int = 1) -> None:
        self.nodes, self.environment = workers + spare, dict(os.environ)

    def __enter__(self) -> Nodes:
        # A folder of its own: in /tmp/ray a bare ray.init() of somebody else would find this cluster.
        self.folder = tempfile.mkdtemp(prefix="ray-")
        os.environ |= {"RAY_TMPDIR": self.folder, "RAY_AUTH_MODE": "token"}
        # Nothing but this script is to kill.
        os.environ |= {"RAY_memory_monitor_refresh_ms": "0"}
        os.environ |= NOTICED_SOON | ON_DEMAND
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(self.nodes):
            self.cluster.add_node(num_cpus=1)
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)
        os.environ.clear()
        os.environ.update(self.environment)

    def command(self, stage: str, config: Path, run_dir: Path, *overrides: str) -> subprocess.Popen[str]:
        """`python -m pipelines.<stage>` on this cluster."""
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                f"pipelines.{stage}",
                "--config",
                config,
                f"run_dir={run_dir}",
                *overrides,
            ],
            cwd=ROOT,
            env=os.environ | {"RAY_ADDRESS": self.cluster.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def train_workers(self) -> dict[psutil.Process, Any]:
        """Processes of the training, each with its node."""
        return {
            process: node
            for node in self.cluster.worker_nodes
            for raylet in node.all_processes["raylet"]
            for process in psutil.Process(raylet.process.pid).children()
            if "RayTrainWorker" in " ".join(process.cmdline())
        }

    def controller(self) -> psutil.Process:
        """The process of Ray Train's controller, on the head, beside the driver."""
        (raylet,) = self.cluster.head_node.all_processes["raylet"]
        started = psutil.Process(raylet.process.pid).children()
        return next(process for process in started if "TrainController" in " ".join(process.cmdline()))

    def kill(self, kind: str, driver: subprocess.Popen[str], rng: random.Random) -> bool:
        """Kill a process or a node, or stop a process; False if there is none."""
        workers = sorted(self.train_workers().items(), key=lambda item: item[0].pid)
        if kind == "driver":
            driver.kill()
        elif kind == "controller":
            self.controller().kill()
        elif not workers:
            return False
        else:
            process, node = rng.choice(workers)
            if kind == "worker":
                process.kill()
            elif kind == "stop":
                process.suspend()
            else:
                self.cluster.remove_node(node, allow_graceful=False)
                self.cluster.add_node(num_cpus=1)
        return True


@pytest.fixture(scope="module")
def training_nodes():
    """Room for two workers; one that is killed has its place taken by a new one."""
    with Nodes(workers=2, spare=0) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def training_inputs(tmp_path_factory, tiny_chat):
    """A folder with a model, pairs, and config.yaml for two workers and 12 steps."""
    folder = tmp_path_factory.mktemp("inputs")
    model = save_model(folder / "model", tiny_chat)
    data = write_jsonl(folder / "pairs.jsonl", invented_pairs(22))
    (folder / "config.yaml").write_text(tiny_config(folder / "run", model, data, train=TRAIN).to_yaml())
    return folder


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Intact rows of a log."""
    return MetricsLog(run / name).read()


def checkpoints(run: Path) -> set[Path]:
    """Folders of checkpoints, whole or not."""
    return {folder for folder in (run / "train" / "ray").glob("checkpoint_*") if folder.is_dir()}


def is_moment(run: Path, moment: str, step: int, before: set[Path]) -> bool:
    """Whether the training of `run` is past `step` and in the middle of what is to be disturbed."""
    if len(rows(run)) < step:
        return False
    digest = sha256(str(run.resolve()).encode()).hexdigest()[:16]
    written = list(Path(tempfile.gettempdir()).glob(f"bdpo-{digest}-*"))
    copied = checkpoints(run) - before
    return moment == "step" or (moment == "write" and bool(written)) or bool(copied)


def disturb(
    nodes: Nodes,
    config: Path,
    run: Path,
    kills: Sequence[tuple[str, str]],
    seed: int,
    overrides: Sequence[str],
) -> Account:
    """Train, killing what `kills` say at steps drawn with the seed; the account, without `partial`.

    Each kill is drawn from the first part of the steps that are left, so that all of them find their moment.
    """
    rng, account = random.Random(seed), Account()
    steps = len(rows(run.parent / "undisturbed"))
    driver = nodes.command("train", config, run, *overrides)
    for left, (kind, moment) in zip(range(len(kills), 0, -1), kills, strict=True):
        done = len(rows(run))
        step = rng.randint(done, done + max(0, steps - 2 - done) // left)
        before = checkpoints(run)
        while driver.poll() is None and not is_moment(run, moment, step, before):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        attempts = len(rows(run, "train/recoveries.jsonl"))
        if driver.poll() is not None or not nodes.kill(kind, driver, rng):
            break  # it was too fast; what is left is for the next training
        account.kills.append(f"{kind} in {moment} after step {len(rows(run))}")
        if kind == "driver":
            driver.wait()
            driver = nodes.command("train", config, run, *overrides)
        while driver.poll() is None and len(rows(run, "train/recoveries.jsonl")) == attempts:
            time.sleep(0.02)  # the next kill meets a training that has resumed
    output, _ = driver.communicate()
    assert driver.returncode == 0, output
    account.recovered = len(account.kills)
    for note in rows(run, "train/recoveries.jsonl"):
        lost = note["reached"] - note["step"] if "step" in note else 0
        assert lost <= 2 * save_steps(run), note  # one checkpoint on its way, one about to be written
        account.lost_steps += lost
        account.refused += len(note["damaged"])
    return account


def save_steps(run: Path) -> int:
    """How often `run` is saved."""
    return load_config(run / "config.yaml").train.save_steps


def loaded_other_than(undisturbed: Path, run: Path) -> int:
    """Number of checkpoints that `run` was resumed from and that differ from those of the undisturbed."""
    originals = {_part(folder)["step"]: folder for folder in checkpoints(undisturbed)}
    different = 0
    for note in rows(run, "train/recoveries.jsonl"):
        if note.get("checkpoint"):
            different += not _same_files(originals[note["step"]], run / "train/ray" / note["checkpoint"])
    return different


def assert_same_end(undisturbed: Path, run: Path) -> None:
    """Weights and metrics are those of the undisturbed training, and no checkpoint is left half written."""
    from pipelines.runtime.recovery import incomplete_checkpoints

    assert not incomplete_checkpoints(run / "train" / "ray")
    digests = [sha256((folder / "model/model.safetensors").read_bytes()) for folder in (undisturbed, run)]
    assert digests[0].hexdigest() == digests[1].hexdigest()
    one, other = ([{**row, "tokens_per_second": 0} for row in rows(folder)] for folder in (undisturbed, run))
    assert one == other


def _part(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "part-0.json").read_text())


def _same_files(one: Path, other: Path) -> bool:
    files = sorted(file.relative_to(one) for file in one.rglob("*.pt"))
    load = lambda folder, file: torch.load(folder / file, weights_only=False)  # noqa: E731
    return bool(files) and all(
        (other / file).exists() and same(load(one, file), load(other, file)) for file in files
    )


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, in whatever lists, dicts and objects tensors lie."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (hasattr(a, "__dict__") and same(vars(a), vars(b)))


def score_and_train(nodes: Nodes, config: Path, folder: Path, overrides: Sequence[str]) -> None:
    """Make `folder/scored`, a run that is scored, and `folder/undisturbed`, one that is trained as well."""
    for stage, name in (("score", "scored"), ("train", "undisturbed")):
        if stage == "train":
            shutil.copytree(folder / "scored", folder / "undisturbed")
        command = nodes.command(stage, config, folder / name, *overrides)
        output, _ = command.communicate()
        assert command.returncode == 0, output


def score_and_train_without_ray(config: Path, folder: Path) -> None:
    """The same two folders by the plain processes of the tests: faster, and a judge of Ray Train."""
    settings = load_config(config)
    scored = scored_run(settings.model_copy(update={"run_dir": str(folder / "scored")}))
    shutil.copytree(scored.root, folder / "undisturbed")
    pq.write_table(read_scores(settings, scored), folder / "undisturbed" / "scores.parquet")
    alone = settings.model_copy(update={"run_dir": str(folder / "undisturbed")})
    launch([alone], settings.train.workers)
    (folder / "undisturbed" / "train" / "ray").mkdir(parents=True)
    for checkpoint in (folder / "undisturbed" / "checkpoints").iterdir():
        checkpoint.rename(folder / "undisturbed" / "train" / "ray" / f"checkpoint_{checkpoint.name}")


def kill_training(
    nodes: Nodes,
    config: Path,
    folder: Path,
    kills: Sequence[tuple[str, str]],
    seed: int,
    overrides: Sequence[str],
) -> Account:
    """Disturb one training after the other until all `kills` are done, each training by a few of them.

    `folder` has `scored` and `undisturbed`, as `score_and_train` or `score_and_train_without_ray` makes them.
    """
    rng, total = random.Random(seed), Account()
    overrides = [*overrides, *DISTURBED]
    while len(total.kills) < len(kills):
        run = folder / f"run-{len(total.kills)}"
        shutil.copytree(folder / "scored", run)
        some = kills[len(total.kills) :][:KILLS_OF_ONE_TRAINING]
        account = disturb(nodes, config, run, some, rng.randrange(10**9), overrides)
        assert_same_end(folder / "undisturbed", run)
        account.partial = loaded_other_than(folder / "undisturbed", run)
        print(f"{run.name}: {', '.join(account.kills)}\n  {account}", flush=True)
        for name, value in vars(account).items():
            setattr(total, name, getattr(total, name) + value)
        shutil.rmtree(run)
    return total
