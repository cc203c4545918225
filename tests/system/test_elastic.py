"""A training with `train.workers: [min, max]` on a cluster whose nodes come and go while it trains."""

from __future__ import annotations

import shutil
import threading
from contextlib import contextmanager

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.support.killed_training import Nodes, rows
from tests.support.ray_nodes import wait_until

SECONDS = 240

NOTICED = 45
"""Ray counts the cluster's nodes anew every 20 seconds, and asks for room as often."""

TOLERANCE = 1e-5
"""That of `tests/training/test_resharding.py`: rounding in float32, after as many changes."""


@pytest.fixture(scope="module")
def two_nodes():
    """Room for two workers."""
    with Nodes(workers=1) as nodes:
        yield nodes


def finished(command):
    output, _ = command.communicate(timeout=SECONDS)
    assert command.returncode == 0, output
    return output


def numbers(run):
    """The numbers of workers that resumed the training, one after the other."""
    return [note["workers"] for note in rows(run, "train/recoveries.jsonl")]


@contextmanager
def standing_still(nodes):
    """No step is made while the block runs; yields the worker that is stopped, and its node."""
    process, node = wait_until(lambda: next(iter(nodes.train_workers().items()), None), "a worker", SECONDS)
    process.suspend()
    try:
        yield process, node
    finally:
        process.resume()


def test_workers_follow_the_nodes_and_train_as_a_fixed_number(two_nodes, training_inputs, tmp_path):
    config, scored, fixed, run = (
        training_inputs / "config.yaml",
        *(tmp_path / name for name in ("scored", "fixed", "run")),
    )
    finished(two_nodes.command("score", config, scored))
    shutil.copytree(scored, fixed)
    shutil.copytree(scored, run)
    finished(two_nodes.command("train", config, fixed))

    elastic = "train.workers=[1,3]", "train.max_failures=-1", "train.stall_seconds=300"
    command = two_nodes.command("train", config, run, *elastic)
    try:
        wait_until(lambda: rows(run) or command.poll() is not None, "the first step", SECONDS)
        assert command.poll() is None, command.communicate()
        assert len(two_nodes.train_workers()) == 2
        with standing_still(two_nodes):
            two_nodes.cluster.add_node(num_cpus=1)
            threading.Event().wait(NOTICED)
        wait_until(lambda: 3 in numbers(run) or command.poll() is not None, "three workers", SECONDS)
        with standing_still(two_nodes) as (stopped, _):
            others = [node for process, node in two_nodes.train_workers().items() if process != stopped]
            two_nodes.cluster.remove_node(others[0], allow_graceful=False)
        output = finished(command)
    finally:
        with_children(command)
    assert numbers(run) == [3, 2]
    assert "with 3 workers" in output
    assert [row["step"] for row in rows(run)] == list(range(1, 13))
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (run, fixed)]
    torch.testing.assert_close(*weights, rtol=0, atol=TOLERANCE)
    to_three, to_two = rows(run, "train/recoveries.jsonl")
    assert to_three["reached"] - to_three["step"] <= 4  # it waited until a checkpoint was written
    assert to_two["step"] >= to_three["step"]


def with_children(command):
    """End a command that has not ended."""
    if command.poll() is None:
        for process in psutil.Process(command.pid).children(recursive=True):
            process.kill()
        command.kill()
        command.wait()
