"""Progress on the terminal and as Ray metrics."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

if TYPE_CHECKING:
    from ray.util.metrics import Gauge


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def for_terminal(text: str) -> str:
    """The text with control characters, of which a terminal would make something else, written as escapes."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


class _Terminal(Console):
    """The terminal: of names that come from files and data sets it gets no control character."""

    def render_str(self, text: str, **options: Any) -> Text:
        """The text, or a cell of a table, as it is printed."""
        return super().render_str(for_terminal(text), **options)


console = _Terminal()


@contextmanager
def silent_console() -> Iterator[None]:
    """Nothing is shown on the terminal: no tables, lines or bars."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


class _Note(ProgressColumn):
    """The note of a task, cut where the terminal ends: numbers and times of the work stand before it."""

    def render(self, task: Task) -> Text:
        """The note on one line."""
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


def _fixed() -> Column:
    """A column that a narrow terminal does not make narrower."""
    return Column(no_wrap=True)


LOOK_SECONDS = 1.0
"""How often a bar looks at the work between two steps."""

LINE_SECONDS = 30.0
"""How often a line shows how far the work is where there is no terminal."""

SPEED_SECONDS = 600.0
"""By how much of the last time the time left is estimated."""


class InWork(NamedTuple):
    """What is begun and not yet counted as done: so many rows, and a note."""

    rows: float = 0.0
    note: str = ""


@contextmanager
def progress_bar(
    title: str, total: int | None = None, done: int = 0, in_work: Callable[[], InWork] | None = None
) -> Iterator[Callable[..., None]]:
    """A bar on the terminal; calling what it yields moves it: `advance(rows, note="loss 0.61")`.

    Between such calls it looks at what is `in_work`. Where standard output is no terminal, as in a log file,
    a line shows the same at the beginning, every `LINE_SECONDS`, and at the end.
    """
    columns = (
        TextColumn("[bold]{task.description:<16}"),
        BarColumn(bar_width=10, table_column=_fixed()),
        MofNCompleteColumn(table_column=_fixed()),
        TimeElapsedColumn(table_column=_fixed()),
        *((TextColumn("left"), TimeRemainingColumn(table_column=_fixed())) if total else ()),
        _Note(),
    )
    as_lines = not console.is_terminal
    with Progress(
        *columns, console=console, speed_estimate_period=SPEED_SECONDS, disable=as_lines
    ) as progress:
        task = progress.add_task(title, total=total, completed=done, note="")
        begun, counted = time.monotonic(), float(done)

        def show(rows: float, note: str) -> None:
            completed = max(rows, progress.tasks[task].completed)  # what was lost with a worker stays shown
            progress.update(task, completed=completed, note=note)
            _publish(title, completed, total, (completed - done) / (time.monotonic() - begun))

        def advance(steps: int, note: str = "") -> None:
            nonlocal counted
            counted += steps
            show(counted, note)

        def look() -> None:
            if in_work is not None:
                seen = in_work()
                show(counted + seen.rows, seen.note)

        def line() -> None:
            if as_lines:
                console.print(progress.get_renderable())

        with _meanwhile(look, line):
            yield advance


@contextmanager
def _meanwhile(look: Callable[[], None], line: Callable[[], None]) -> Iterator[None]:
    """Call `look` every `LOOK_SECONDS`; `line` at the beginning, every `LINE_SECONDS`, and at the end."""
    ended = threading.Event()

    def watch() -> None:
        shown = time.monotonic()
        while not ended.wait(LOOK_SECONDS):
            look()
            if time.monotonic() - shown >= LINE_SECONDS:
                line()
                shown = time.monotonic()

    thread = threading.Thread(target=watch, daemon=True)
    look()
    line()
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        line()


def _publish(stage: str, done: float, total: int | None, per_second: float) -> None:
    """Progress as metrics of Ray, for the dashboard and Prometheus, once Ray is there: counts alone."""
    if "ray" not in sys.modules:  # importing it here would be before `connect` has set its environment
        return
    import ray

    if ray.is_initialized():
        values = {"done": done, "total": total or 0, "per_second": per_second}
        for name, value in values.items():
            _gauge(name).set(value, tags={"stage": stage})


@cache
def _gauge(name: str) -> Gauge:
    from ray.util.metrics import Gauge

    what = {
        "done": "rows or steps done",
        "total": "rows or steps in all",
        "per_second": "rows or steps a second",
    }
    return Gauge(f"bdpo_stage_{name}", f"{what[name]}, by stage", tag_keys=("stage",))
