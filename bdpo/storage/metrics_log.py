"""`metrics.jsonl` and `recoveries.jsonl`: JSON lines that a training appends."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from bdpo.storage.paths import StoragePath, read_text, write_text


class MetricsLog:
    """`metrics.jsonl`: one line an optimizer step, written by one worker; `recoveries.jsonl` likewise.

    An object cannot be appended to: on object storage the worker keeps the lines and writes all of them, at
    intervals of `WRITE_SECONDS` and before a checkpoint.
    """

    WRITE_SECONDS = 10.0

    def __init__(self, file: StoragePath) -> None:
        self.file = file
        self.rows: list[dict[str, Any]] | None = None  # of object storage: what was read, and came after
        self.written = -math.inf

    def keep(self, steps: int) -> None:
        """Drop what was logged after the checkpoint that training resumes from."""
        self.rows = [row for row in self.read() if row["step"] <= steps]
        write_text(self.file, _lines(self.rows))

    def append(self, metrics: dict[str, Any]) -> None:
        """Add the metrics of a step."""
        if isinstance(self.file, Path):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(_lines([metrics]))
            return
        self.rows = [*(self.read() if self.rows is None else self.rows), metrics]
        if time.monotonic() - self.written > self.WRITE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Have all lines in the run folder: before a checkpoint, which counts on those of its steps."""
        if not isinstance(self.file, Path) and self.rows is not None:
            write_text(self.file, _lines(self.rows))
            self.written = time.monotonic()

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; one that a killed process left unfinished does not count."""
        try:
            *lines, _ = read_text(self.file).split("\n")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
