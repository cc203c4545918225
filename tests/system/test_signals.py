"""A real run is interrupted in one stage after the other; the last command finishes it."""

from __future__ import annotations

import signal
import time

import psutil
import pytest

from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.run_dir import RunDir
from pipelines.status import run_status
from tests.support.commands import start_alone
from tests.support.pipeline import pipeline_inputs
from tests.support.ray_nodes import wait_until


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_chat):
    return pipeline_inputs(tmp_path_factory.mktemp("inputs"), tiny_chat)


STAGES = {
    "scoring": lambda run: any(run.scores.glob("part-*")),
    "answers of the base": lambda run: any(run.responses("base").glob("part-*")),
    "training": lambda run: len(MetricsLog(run.metrics).read()) > 1,
    "answers of the trained": lambda run: any(run.responses("trained").glob("part-*")),
}
"""When a stage is under way, by what its folder holds."""


def start(inputs):
    return start_alone("-m", "pipelines.run", "--config", inputs / "config.yaml", "train.workers=1")


def test_a_run_that_is_interrupted_in_every_stage_is_finished_by_the_same_command(inputs):
    run, signals = RunDir(inputs / "run"), (signal.SIGINT, signal.SIGTERM)
    for number, (stage, under_way) in enumerate(STAGES.items()):
        signum, process = signals[number % 2], start(inputs)
        wait_until(lambda: under_way(run) or process.poll() is not None, stage)  # noqa: B023
        assert process.poll() is None, (stage, process.stderr.read())
        started = psutil.Process(process.pid).children(recursive=True)
        begun = time.monotonic()
        for _ in range(1 + 2 * (number // 2)):  # once, later three times
            process.send_signal(signum)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signum, (stage, err)
        assert err.splitlines()[-1].endswith("the same command resumes here"), (stage, err)
        assert "Traceback" not in err
        assert time.monotonic() - begun < 12, stage
        _, left = psutil.wait_procs(started, timeout=30)
        assert not left, stage
    process = start(inputs)
    _, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    assert {status.state for status in run_status(run)} == {"done"}
