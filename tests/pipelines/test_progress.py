"""What a bar shows on a narrow terminal."""

from __future__ import annotations

import io

import pytest

from pipelines.runtime import progress


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
