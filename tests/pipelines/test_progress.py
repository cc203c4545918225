"""What a bar shows on a narrow terminal, and in a log file."""

from __future__ import annotations

import io

import pytest

from pipelines.runtime import progress
from tests.support.ray_nodes import wait_until


@pytest.mark.parametrize("width", [80, 100, 200])
def test_steps_and_times_stand_and_the_note_gives_way(monkeypatch, width):
    shown = io.StringIO()
    terminal = progress._Terminal(file=shown, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(progress, "console", terminal)
    with progress.progress_bar("train", 1200) as advance:
        advance(96, "loss 0.406  margin 0.73  accuracy 100%  4,252 tokens/s  eval loss 0.413")
    lines = shown.getvalue().replace("\x1b[2K", "").splitlines()  # the code that erases a line
    last = [line for line in lines if "96/1200" in line][-1]
    assert len(last) <= width
    assert "0:00:0" in last
    assert " left " in last
    assert "loss 0.4" in last
    assert ("eval loss 0.413" in last) == (width == 200)


@pytest.fixture
def often(monkeypatch):
    """The work is looked at, and shown, many times a second."""
    monkeypatch.setattr(progress, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)


def shown_on(monkeypatch, **terminal):
    shown = io.StringIO()
    monkeypatch.setattr(progress, "console", progress._Terminal(file=shown, width=80, **terminal))
    return shown


def test_a_log_file_has_a_line_from_time_to_time(monkeypatch, often):
    """At the beginning, with what is begun meanwhile, and at the end; steps, times and note in each."""
    shown = shown_on(monkeypatch)
    seen = progress.InWork(0, "starting 2 of 2 workers")
    with progress.progress_bar("score", 600, 512, lambda: seen) as advance:
        [line] = shown.getvalue().splitlines()
        assert line.startswith("score ")
        assert " 512/600 0:00:00 left -:--:-- starting 2 of 2 workers" in line
        seen = progress.InWork(40.7)
        wait_until(lambda: " 552/600 " in shown.getvalue(), "the rows in work", 60)
        seen = progress.InWork()
        advance(44)
        wait_until(lambda: " 556/600 " in shown.getvalue(), "the rows that are done", 60)
        advance(44)
    lines = shown.getvalue().splitlines()
    assert all(len(line) <= 80 and " left " in line for line in lines)
    assert " 600/600 " in lines[-1]
    assert not any("\x1b" in line for line in lines)


def test_nothing_goes_back_when_work_is_lost(monkeypatch, often):
    shown = shown_on(monkeypatch)
    seen, looks = progress.InWork(40), 0

    def in_work():
        nonlocal looks
        looks += 1
        return seen

    with progress.progress_bar("score", 600, 0, in_work):
        seen = progress.InWork(7)
        before = looks
        wait_until(lambda: looks > before + 2, "two more looks", 60)
    assert " 40/600 " in shown.getvalue().splitlines()[-1]
    assert " 7/600 " not in shown.getvalue()


def test_a_bar_on_a_terminal_advances_within_a_shard(monkeypatch, often):
    shown = shown_on(monkeypatch, force_terminal=True, color_system=None)
    with progress.progress_bar("score", 600, 0, lambda: progress.InWork(40)):
        wait_until(lambda: " 40/600 " in shown.getvalue(), "the rows in work", 60)


def test_a_silent_console_gets_no_line(monkeypatch, often):
    shown = shown_on(monkeypatch)
    with progress.silent_console(), progress.progress_bar("score", 600) as advance:
        advance(600)
    assert not shown.getvalue()
