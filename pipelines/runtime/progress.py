"""Progress on the terminal and as Ray metrics."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from ray.util.metrics import Gauge


console = Console()


@contextmanager
def progress_bar(title: str, total: int | None = None, done: int = 0) -> Iterator[Callable[..., None]]:
    """A bar on the terminal; calling what it yields moves it: `advance(rows, note="loss 0.61")`."""
    columns = (
        TextColumn("[bold]{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, completed=done, note="")
        begun = time.monotonic()

        def advance(steps: int, note: str = "") -> None:
            progress.update(task, advance=steps, note=note)
            completed = progress.tasks[task].completed
            _publish(title, completed, total, (completed - done) / (time.monotonic() - begun))

        yield advance


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
