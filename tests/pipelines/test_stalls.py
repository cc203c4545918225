"""Workers that stand still are noticed within their limit, killed and replaced."""

from __future__ import annotations

import subprocess
import threading
import time
from contextlib import suppress

import psutil
import pytest
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from bdpo.errors import UserError
from pipelines.runtime import progress
from pipelines.runtime.cluster import connect
from pipelines.runtime.pool import InProcess, RayPool, ShardWork
from pipelines.runtime.stalls import NoRoom, Reporter, watched_tasks, watching
from pipelines.runtime.work_times import PAUSED, Worker
from tests.support.ray_nodes import wait_until
from tests.support.stalling import SHARDS, Refusing, Slow, Stalling, stalls_once


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
        with watching("training", 0.2, together=True) as watched:
            watch = watched.watch
            watch.begin.remote(was, "step", "an optimizer step")
            watch.begin.remote(now, PAUSED, "the wait for a decision")
            wait_until(lambda: ray.get(watch.workers.remote()) == [now], "the dead worker is forgotten", 60)
        assert alive.poll() is None
    finally:
        alive.kill()
        alive.wait()


@pytest.mark.ray
def test_a_worker_that_ended_while_it_paused_is_forgotten_and_one_that_pauses_is_left_alone():
    """Else the work would never wait for room: one that may wait as long as it likes seems to be at work."""
    connect()
    (dead, was), (alive, now) = started(), started()
    gone = Worker("0" * 56, "host", alive.pid, now.began)  # its node has ended
    try:
        with watching("trials", 0.2) as watched:
            watch = watched.watch
            for worker in (was, now, gone):
                watch.begin.remote(worker, PAUSED, "its trainings")
            time.sleep(1)
            assert was in ray.get(watch.workers.remote())
            dead.kill()  # nobody waits for it yet: a zombie has ended as well
            wait_until(lambda: ray.get(watch.workers.remote()) == [now], "the dead worker is forgotten", 60)
            time.sleep(1)
            assert ray.get(watch.workers.remote()) == [now]
        assert alive.poll() is None
    finally:
        for process in (dead, alive):
            process.kill()
            process.wait()


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
        with suppress(psutil.NoSuchProcess):  # it may have ended with its pool
            psutil.Process(stalled).kill()
    else:
        assert f"worker {stalled} on " in shown
        assert "stands still" in shown
        assert not psutil.pid_exists(stalled) or psutil.Process(stalled).status() == psutil.STATUS_ZOMBIE
    assert time.monotonic() - begun < 120


@pytest.mark.ray
def test_a_shard_may_take_longer_than_the_limit_while_its_actor_gives_signs_of_life(
    tmp_path, capsys, monkeypatch
):
    """Its progress is shown meanwhile. An actor that gives no sign any more stands still."""
    monkeypatch.setattr(progress, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.5)
    # Of a shard, as soon as the first one has ended; a sign of life a second may come late on a busy machine.
    limit = 10.0
    work = ShardWork("score", Slow, {"folder": tmp_path, "seconds": 2 * limit}, None, 300, 100)
    RayPool("score", 1, 0, limit).make_shards(work, [(first, 100) for first in (0, 100, 200)], 0)
    shown = capsys.readouterr().out
    stalled = int((tmp_path / "stalled").read_text())
    assert [file.name for file in tmp_path.glob("100.*")] == [f"100.{stalled}"]  # nobody began it again
    assert shown.count("stands still") == 1
    assert f"worker {stalled} on " in shown
    assert "the shard of rows 200 to 299 has taken" in shown  # a part of it, if its sign was sent in time
    assert " 0/300 " in shown
    assert " 140/300 " in shown or " 40/300 " in shown  # Ray Data may return a shard late
    assert " 240/300 " not in shown
    assert shown.splitlines()[-1].split()[2] == "300/300"


@pytest.mark.ray
def test_what_a_process_does_many_times_a_second_is_reported_once_a_second():
    connect()

    @ray.remote(num_cpus=0)
    class Noted:
        def __init__(self):
            self.begun = []

        def begin(self, worker, kind, what, at_least=0.0, rows=0.0):
            self.begun.append((kind, rows))

        def all(self):
            return self.begun

    noted = Noted.remote()
    reporter = Reporter(noted)
    for row in range(1000):
        reporter.begin("part", "a part of it", rows=row)
    reporter.begin(PAUSED, "its wait")
    reporter.begin("part", "a part of it", rows=1000)
    first, *between, pause, last = ray.get(noted.all.remote())
    assert (first, pause, last) == (("part", 0), (PAUSED, 0.0), ("part", 1000))
    assert len(between) < 100


@pytest.mark.ray
@pytest.mark.parametrize(("at_start", "attempts"), [(True, "start "), (False, "shard ")])
def test_what_the_user_has_to_correct_ends_a_stage_at_its_first_attempt(tmp_path, at_start, attempts):
    """Not after as many shards, or dead actors, as a stage may lose, each of which may load a model."""
    arguments = {"folder": tmp_path, "at_start": at_start}
    work = ShardWork("judge", Refusing, arguments, None, SHARDS, 1)
    with pytest.raises(UserError, match=r"^evaluate\.judge\.model: no such thing$"):
        RayPool("evaluate", 1, 0, 60.0).make_shards(work, [(row, 1) for row in range(SHARDS)], may_fail=4)
    assert (tmp_path / "attempts").read_text() == attempts


@pytest.mark.ray
def test_a_task_that_stands_still_is_killed_and_run_again(tmp_path, capsys):
    connect()
    calls = {name: (tmp_path / name, "stop" if name == "second" else "") for name in ("first", "second")}
    for folder, _ in calls.values():
        folder.mkdir()
    found = dict(watched_tasks("capability base", stalls_once, calls, 0, 0.5))
    shown = capsys.readouterr().out
    stalled = int((tmp_path / "second" / "stalled").read_text())
    assert f"worker {stalled} on " in shown
    assert "stands still: a forward of it has taken" in shown
    assert found == {"first": "done", "second": "done"}


@pytest.mark.ray
def test_what_a_task_raises_is_raised():
    connect()
    with pytest.raises(ZeroDivisionError):
        list(watched_tasks("capability base", raises, {"one": ()}, 0, 60))


def raises(begins):
    begins("start", "its start")
    raise ZeroDivisionError


@pytest.mark.ray
def test_work_for_which_there_is_no_room_is_given_up(capsys):
    """Named after the shortest limit, given up after that of a wait for room: nothing waits for ever."""
    connect()
    never = threading.Event()
    with (
        pytest.raises(NoRoom, match=r"^score: no worker has begun within 0\.0167 minutes: .* resumes$"),
        watching("score", 0.2, room=1.0) as watched,
    ):
        watched.wait(never.wait)
    never.set()
    shown = capsys.readouterr().out
    assert shown.count("score  no worker has begun for") == 1
    assert "given up after 0.0167 minutes" in shown


@pytest.mark.ray
def test_the_room_of_a_training_whose_controller_died_is_given_back():
    """A placement group outlives the actor that made it, and nobody else ends it without a dashboard."""
    connect()
    with watching("training", 60, together=True) as watched:
        group = ray.util.placement_group([{"CPU": 1}])
        inside = PlacementGroupSchedulingStrategy(placement_group=group)
        report = ray.remote(num_cpus=1)(Reporter.hold_placement_group).options(scheduling_strategy=inside)
        ray.get(report.remote(Reporter(watched.watch)))
        wait_until(lambda: ray.get(watched.watch.held.remote()) == [group], "the report", 60)
        watched.release()
        wait_until(lambda: ray.util.placement_group_table(group)["state"] == "REMOVED", "the room", 60)
        watched.release()  # of what is given back nothing is left


def test_a_process_reports_every_shard_and_the_signs_of_life_in_it_and_pauses_between():
    begun = []

    class Actor:
        def __init__(self, device):
            begun.append("made")

        def __call__(self, shard):
            self.progress(1.5)
            if shard["first"] == 4:
                raise ZeroDivisionError

    class Store:
        def missing(self, total, rows):
            return [(0, 4), (4, 2)]

    here = InProcess(1, lambda *what: begun.append(what)).without_model()
    with pytest.raises(ZeroDivisionError):
        here.complete_shards(ShardWork("judge trained", Actor, {}, Store(), 6, 4, at_least=70.0))
    assert begun == [
        ("start of judge trained", "its start"),
        "made",
        ("judge trained", "the shard of rows 0 to 3", 70.0),
        ("part of judge trained", "a part of the shard of rows 0 to 3", 70.0),
        ("judge trained", "the shard of rows 4 to 5", 70.0),
        ("part of judge trained", "a part of the shard of rows 4 to 5", 70.0),
        (PAUSED, "its work between shards"),
    ]
