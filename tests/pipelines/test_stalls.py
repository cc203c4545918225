"""Workers that stand still are noticed within their limit, killed and replaced."""

from __future__ import annotations

import subprocess
import time

import psutil
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from pipelines.runtime.cluster import connect
from pipelines.runtime.pool import RayPool, ShardWork
from pipelines.runtime.stalls import IDLE, PAUSED, SLOWER, UNKNOWN, Worker, WorkTimes, end_process, watching
from tests.support.ray_nodes import wait_until
from tests.support.stalling import SHARDS, Stalling

A, B = Worker("node", "host", 1, 0.0), Worker("node", "host", 2, 0.0)


def test_the_limit_grows_with_the_slowest_work_of_its_kind():
    times = WorkTimes(60)
    assert times.limit("shard") == 60 * UNKNOWN
    times.begin(A, "shard", "", 0)
    times.begin(A, IDLE, "", 5)
    assert times.limit("shard") == 60
    assert times.limit("step") == 60 * UNKNOWN
    times.begin(A, "shard", "", 10)
    times.begin(A, "shard", "", 60)
    assert times.limit("shard") == SLOWER * 50


@given(st.lists(st.floats(0.01, 1e5), min_size=1, max_size=9), st.floats(0.1, 1e3))
def test_work_is_stalled_exactly_beyond_the_limit(durations, shortest):
    times, now = WorkTimes(shortest), 0.0
    for duration in durations:
        times.begin(A, "shard", "rows", now)
        now += duration
    times.begin(A, "shard", "rows", now)
    limit = max(shortest, 3 * max(durations))
    assert times.limit("shard") == pytest.approx(limit)
    assert not times.stalled(now + limit * 0.99)
    (stall,) = times.stalled(now + limit * 1.01)
    assert (stall.worker, stall.what) == (A, "rows")
    assert stall.seconds > stall.limit == pytest.approx(limit)


def test_a_worker_that_was_only_slow_gets_three_times_as_long():
    times = WorkTimes(1)
    times.begin(A, "shard", "", 0)
    assert times.stalled(11)
    times.forget(A, 11, stalled=True)
    assert not times.stalled(12)
    assert times.limit("shard") == 33
    times.begin(B, "shard", "", 12)
    times.forget(B, 9999, stalled=False)  # it crashed, and was noticed late
    assert times.limit("shard") == 33


def test_waiting_is_no_stall_unless_all_workers_wait_for_work():
    times = WorkTimes(60)
    times.begin(A, "shard", "", 0)
    times.begin(A, IDLE, "", 10)
    times.begin(B, "shard", "", 10)
    assert not times.stalled(11 + 59)
    times.begin(B, IDLE, "", 71)
    assert [stall.worker for stall in times.stalled(73 + SLOWER * 61)] == [A, B]
    times.begin(B, PAUSED, "", 80)
    assert not times.stalled(1e9)


def test_only_the_very_process_is_killed():
    process = subprocess.Popen(["sleep", "600"])
    began = psutil.Process(process.pid).create_time()
    try:
        assert not end_process(process.pid, began + 1)
        assert process.poll() is None
        assert end_process(process.pid, began)
        assert process.wait(60) == -9
        assert not end_process(process.pid, began)
    finally:
        process.kill()


def started():
    """A process that does nothing, and the same as a worker of this node."""
    process = subprocess.Popen(["sleep", "600"])
    began = psutil.Process(process.pid).create_time()
    node = ray.get_runtime_context().get_node_id()
    return process, Worker(node, "host", process.pid, began)


@pytest.mark.ray
def test_a_worker_that_died_is_no_reason_to_kill_those_that_replaced_it():
    connect()
    (dead, was), (alive, now) = started(), started()
    dead.kill()
    dead.wait()
    try:
        with watching("training", 0.2, together=True) as watch:
            watch.begin.remote(was, "step", "an optimizer step")
            watch.begin.remote(now, PAUSED, "the wait for a decision")
            wait_until(lambda: ray.get(watch.workers.remote()) == [now], "the dead worker is forgotten", 60)
        assert alive.poll() is None
    finally:
        alive.kill()
        alive.wait()


@pytest.mark.ray
@pytest.mark.parametrize(("way", "at"), [("stop", 2), ("hang", 2), ("hang", -1), ("stop_later", SHARDS - 1)])
def test_a_pool_replaces_an_actor_that_stands_still(tmp_path, capsys, way, at):
    begun = time.monotonic()
    arguments = {"folder": tmp_path, "way": way, "at": at}
    work = ShardWork("score", Stalling, arguments, None, SHARDS, 1)
    RayPool("score", 1, 0, 1.0).make_shards(work, [(row, 1) for row in range(SHARDS)], 0)
    shown = capsys.readouterr().out
    done = {int(file.stem) for file in tmp_path.glob("*.*")}
    assert done == set(range(SHARDS))
    stalled = int((tmp_path / "stalled").read_text())
    if way == "stop_later":  # all shards are done: nothing is left that it could delay
        psutil.Process(stalled).kill()
    else:
        assert f"worker {stalled} on " in shown
        assert "stands still" in shown
        assert not psutil.pid_exists(stalled) or psutil.Process(stalled).status() == psutil.STATUS_ZOMBIE
    assert time.monotonic() - begun < 120
