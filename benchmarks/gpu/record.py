"""The JSON file of a part, `{"machine": {...}, "rows": [...]}`: complete on disk after every row."""

from __future__ import annotations

import json
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bdpo.storage.paths import write_text
from bdpo.storage.records import versions

Row = dict[str, Any]

# Dense bfloat16, of NVIDIA's data sheets; the first name that is part of the GPU's counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H200 NVL": 835,
    "H100": 989,
    "H800": 989,
    "H200": 989,  # GH200 too
    "H20": 148,
    "B200": 2250,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
}


class NotMeasured(Exception):
    """Why a case has no numbers on this machine."""


class Record:
    """Rows of the cases of a part, each with the name of its `case`."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.machine: dict[str, Any] = {}
        self.rows: list[Row] = []
        if file.is_file():
            vars(self).update(json.loads(file.read_text(encoding="utf-8")))

    def on(self, machine: dict[str, Any]) -> None:
        """Say where the next rows are measured; those of another machine, or other versions, are dropped."""
        if self.machine | {"date": None} != machine | {"date": None}:
            self.rows = []
        self.machine = machine
        self._write()

    def begin(self, case: str) -> None:
        """Drop what an earlier command measured of a case."""
        self.rows = [row for row in self.rows if row["case"] != case]
        self._write()

    def add(self, row: Row) -> None:
        """Keep one more row."""
        self.rows.append(row)
        self._write()

    def head(self, part: str) -> str:
        """The line over a table: command, date, GPU, versions."""
        names = ("python", "torch", "cuda", "transformers", "deepspeed", "ray", "trl", "vllm")
        found = ", ".join(f"{name} {self.machine[name]}" for name in names if self.machine[name])
        return f"`python -m benchmarks.gpu {part}` on {self.machine['date']}: {self.machine['gpu']}, {found}"

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file, json.dumps({"machine": self.machine, "rows": self.rows}, indent=1) + "\n")


def machine(smoke: bool) -> dict[str, Any]:
    """GPU, peak of its matrix units, versions, date."""
    gpu = None if smoke else torch.cuda.get_device_properties(0)
    name = gpu.name if gpu else f"no GPU ({platform.machine()}), smoke"
    return {
        "smoke": smoke,
        "date": str(date.today()),
        "gpu": name,
        "gpu_gib": gpu.total_memory / 2**30 if gpu else None,
        "peak_tflops": peak_tflops(name),
        "cuda": torch.version.cuda,
        **versions(),
        **{package: _version(package) for package in ("trl", "vllm", "triton")},
    }


def peak_tflops(gpu: str) -> int | None:
    """Of its tensor cores in bfloat16; None for a GPU, or a slice of one, that is not in the table."""
    if "MIG" in gpu:
        return None
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in gpu), None)


def mfu(machine: dict[str, Any], operations: float, seconds: float) -> float | None:
    """Model FLOPs utilisation, in percent of the GPU's peak."""
    peak = machine["peak_tflops"]
    return None if peak is None else 100 * operations / seconds / (peak * 1e12)


def shown(value: float | None, form: str = ".1f") -> str:
    """A number of a table, or a dash."""
    return "–" if value is None else format(value, form)


def verdict(what: str, value: float | None, bound: float, at_least: bool = False) -> str:
    """One line: a number against what it is to reach."""
    sign = "at least" if at_least else "at most"
    if value is None:
        return f"- {what}: not measured (to reach: {sign} {bound:g})"
    reached = value >= bound if at_least else value <= bound
    return f"- {what}: **{value:.3g}**, to reach {sign} {bound:g}: {'reached' if reached else 'missed'}"


def not_measured(rows: list[Row]) -> list[str]:
    """A line for each case that has no numbers, and why."""
    return [f"- {row['case']}: {row['why']}" for row in rows if "why" in row]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
