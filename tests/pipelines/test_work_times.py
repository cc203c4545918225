"""How long work may take, and how long it may wait for room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.runtime.work_times import (
    IDLE,
    PAUSED,
    ROOM_SECONDS,
    SLOWER,
    START,
    UNKNOWN,
    AtWork,
    RoomWait,
    Stall,
    Worker,
    WorkTimes,
)

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


def test_work_with_limits_of_its_own_may_take_as_long_as_these():
    times = WorkTimes(60)
    for now in (0, 1):
        times.begin(A, "judge", "a shard", now, at_least=700)
    assert times.limit("judge") == 60
    assert not times.stalled(1 + 699)
    (stall,) = times.stalled(1 + 701)
    assert (stall.limit, stall.slowest) == (700, 1)
    times.begin(A, "judge", "a shard", 901, at_least=700)
    assert times.stalled(901 + 2701)[0].limit == SLOWER * 900


def test_those_that_pause_are_named():
    times = WorkTimes(60)
    times.begin(A, PAUSED, "", 0)
    times.begin(B, "shard", "", 0)
    assert times.paused() == [A]


def test_the_line_names_worker_work_and_limit():
    stall = Stall(Worker("node", "host", 12, 0.0), "the shard of rows 0 to 7", 61.2, 60.0, 12.34)
    line = "worker 12 on host stands still: the shard of rows 0 to 7 has taken 61.2 s (limit 60 s, "
    assert stall.line() == f"{line}slowest so far 12 s)"
    first = Stall(stall.worker, stall.what, stall.seconds, stall.limit, None)
    assert first.line() == f"{line}the first of its kind)"


def test_work_waits_for_room_while_no_worker_is_at_work():
    times = WorkTimes(60, room=100, now=1000)
    assert times.room_wait(1040) == RoomWait(40, 100)
    times.begin(A, "shard", "", 1040)
    times.begin(B, IDLE, "", 1041)
    times.forget(A, 1050, stalled=False)
    assert times.room_wait(9999).seconds == 0
    times.forget(B, 1060, stalled=False)
    times.forget(B, 1070, stalled=False)  # which is not at work
    assert times.room_wait(1065) == RoomWait(5, SLOWER * 40)


def test_a_wait_for_room_has_an_hour_at_least():
    assert WorkTimes(60).room_wait(5) == RoomWait(5, ROOM_SECONDS)
    assert ROOM_SECONDS == 3600


def test_what_there_is_to_show_are_the_rows_of_those_that_have_some():
    times = WorkTimes(1)
    assert times.at_work() == AtWork()
    times.begin(A, START, "its start", 0)
    times.begin(B, "part", "a part of it", 0, rows=3.5)
    assert times.at_work() == AtWork(workers=2, starting=1, rows={"a part of it": 3.5})
    times.forget(B, 1, stalled=True)
    assert times.at_work() == AtWork(workers=1, starting=1)


def test_the_first_sign_of_life_makes_the_limit_that_of_a_part():
    """A worker that stands still in its first shard is noticed ten times as soon after two signs."""
    times = WorkTimes(60)
    times.begin(A, "shard", "rows", 0)
    times.begin(A, "part", "a part", 100)
    times.begin(A, "part", "a part", 110)
    assert not times.stalled(170)
    (stall,) = times.stalled(171)
    assert (stall.what, stall.limit, stall.slowest) == ("a part", 60, 10)
