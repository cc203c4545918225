"""`metrics.jsonl` and `recoveries.jsonl`: logs of JSON lines that a training appends to.

A log is appended to while commands are killed and disks fill up, so a line may be torn or damaged. Each line
carries a digest of its content (`bdpo.storage.sealed`); a line that does not match it is dropped when the log
is read, with a warning, and the other lines stand.
"""

from __future__ import annotations

import logging
import math
import os
import time
from pathlib import Path
from typing import Any

from bdpo.storage.paths import StoragePath, read_bytes, write_text
from bdpo.storage.sealed import sealed, unsealed

Row = dict[str, Any]

log = logging.getLogger(__name__)

# Logs are read twice a second by whoever follows a training: the damage of a file is reported once a process,
# and once more when it grows.
_REPORTED: dict[str, int] = {}  # file -> number of its damaged lines


class MetricsLog:
    """A log of JSON lines that one worker writes: one line per optimizer step, or per recovery.

    An object cannot be appended to: on object storage the worker keeps the rows in memory and writes all of
    them, every `WRITE_SECONDS` and before each checkpoint.
    """

    WRITE_SECONDS = 10.0

    def __init__(self, file: StoragePath) -> None:
        self.file = file
        self.rows: list[Row] | None = None  # on object storage: all rows so far, None before the first read
        self.last_write = -math.inf

    def keep(self, steps: int) -> None:
        """Drop the rows of later steps than that of the checkpoint from which the training resumes."""
        self.rows = [row for row in self.read() if row["step"] <= steps]
        write_text(self.file, _lines(self.rows))

    def append(self, row: Row) -> None:
        """Add a row."""
        if isinstance(self.file, Path):
            self._append_locally(_lines([row]))
            return
        self.rows = [*(self.read() if self.rows is None else self.rows), row]
        if time.monotonic() - self.last_write > self.WRITE_SECONDS:
            self.flush()

    def _append_locally(self, lines: str) -> None:
        """A killed writer may have left half a line: it is closed, so that it does not spoil the next one."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab+") as stream:
            if stream.seek(0, os.SEEK_END):
                stream.seek(-1, os.SEEK_END)
                lines = lines if stream.read(1) == b"\n" else f"\n{lines}"
            stream.write(lines.encode())

    def flush(self) -> None:
        """Write all rows to object storage; a checkpoint relies on the rows of its steps being there."""
        if not isinstance(self.file, Path) and self.rows is not None:
            write_text(self.file, _lines(self.rows))
            self.last_write = time.monotonic()

    def read(self) -> list[Row]:
        """All intact rows; damaged lines are dropped with a warning, an unfinished last line silently.

        The last line is unfinished while another process writes it, which is no damage.
        """
        try:
            *lines, _unfinished = read_bytes(self.file).split(b"\n")
        except FileNotFoundError:
            return []
        rows, damaged = [], []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(unsealed(line))
            except ValueError:
                damaged.append(number)
        self._report(damaged)
        return rows

    def _report(self, damaged: list[int]) -> None:
        if len(damaged) > _REPORTED.get(str(self.file), 0):
            _REPORTED[str(self.file)] = len(damaged)
            named = ", ".join(map(str, damaged[:3])) + (", ..." if len(damaged) > 3 else "")
            log.warning("%s: damaged lines are left out (%d): %s", self.file, len(damaged), named)


def _lines(rows: list[Row]) -> str:
    return "".join(sealed(row) + "\n" for row in rows)
