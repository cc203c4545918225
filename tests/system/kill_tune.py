"""Kill -9 the driver of a sweep at about 30, 60 and 90 % of it; compare with the same sweep left alone.

    python -m tests.system.kill_tune [section.key=value ...]

By hand, minutes on two cores: the sandbox sweep, one trial at a time, so that both must end alike to the
last digit. Prints trials lost, trials repeated, optimizer steps done again, and whether the best is the same.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from bdpo.storage.metrics_log import MetricsLog
from tests.support import ROOT
from tests.support.commands import kill_with_cluster

CONFIG = ROOT / "pipelines" / "configs" / "tune-sandbox.yaml"

COMPARED = ("trial", "status", "step", "objective", "constraint", "score", "winner")


def start(run: Path, overrides: list[str], ray_dir: Path) -> subprocess.Popen[bytes]:
    """The command, with a Ray of its own."""
    arguments = ["--config", str(CONFIG), f"run_dir={run}", "tune.max_concurrent_trials=1", *overrides]
    environment = os.environ | {
        "RAY_ADDRESS": "local",
        "RAY_TMPDIR": str(ray_dir),
        "RAY_AUTH_MODE": "token",
    }
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tune.search", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
        )


def steps(run: Path) -> int:
    """Optimizer steps that are in the logs of the trials now."""
    logs = run.glob("tune/trials/*/metrics.jsonl")
    return sum(len(log.read_text().splitlines()) for log in logs)


def rungs(run: Path) -> dict[str, int]:
    """When each rung of each trial was recorded."""
    files = (run / "tune" / "trials").glob("*/rungs/*.json")
    return {str(file.relative_to(run)): file.stat().st_mtime_ns for file in files}


class Redone:
    """Optimizer steps done again, as the trainings note it when they resume; a trial that ends is tidied."""

    def __init__(self) -> None:
        self.notes: dict[str, list[dict[str, Any]]] = {}

    def look(self, run: Path) -> None:
        """Remember the notes that are there now."""
        for file in run.glob("tune/trials/*/train/recoveries.jsonl"):
            trial, known = file.parts[-3], self.notes.get(file.parts[-3], [])
            self.notes[trial] = max(known, MetricsLog(file).read(), key=len)

    def steps(self) -> int:
        """From where each training went on, or began anew, to where it had been."""
        notes = [note for notes in self.notes.values() for note in notes if "step" in note]
        return sum(note["reached"] - note["step"] for note in notes)


def follow(process: subprocess.Popen[bytes], run: Path, redone: Redone, until: float = math.inf) -> bool:
    """Watch a sweep to its end, or until so many steps are in its logs; has it ended by itself?"""
    while process.poll() is None:
        redone.look(run)
        if steps(run) >= until:
            return False
        time.sleep(0.02)
    return True


def main() -> None:
    """Run both sweeps and print the comparison; exit code 1 if a kill did harm."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over the preset")
    overrides = parser.parse_args().overrides
    with tempfile.TemporaryDirectory(prefix="kill", dir="/tmp") as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        if start(whole, overrides, Path(folder)).wait():
            sys.exit(whole.with_suffix(".log").read_text())
        total, redone = steps(whole), Redone()
        recorded: dict[str, int] = {}
        repeated: set[str] = set()
        for share in (0.3, 0.6, 0.9):
            process = start(killed, overrides, Path(folder))
            if follow(process, killed, redone, share * total):
                sys.exit(killed.with_suffix(".log").read_text())
            kill_with_cluster(process)
            repeated |= {name for name, when in recorded.items() if rungs(killed)[name] != when}
            recorded = rungs(killed)
            print(f"killed at {steps(killed)} of {total} steps, {len(recorded)} rungs recorded", flush=True)
        process = start(killed, overrides, Path(folder))
        follow(process, killed, redone)
        if process.returncode:
            sys.exit(killed.with_suffix(".log").read_text())
        repeated |= {name for name, when in recorded.items() if rungs(killed)[name] != when}
        tables = [pq.read_table(run / "tune" / "results.parquet") for run in (whole, killed)]
        rows = [[{name: row[name] for name in COMPARED} for row in table.to_pylist()] for table in tables]
        names = [{row["trial"] for row in side} for side in rows]
        best = [next(row["trial"] for row in side if row["winner"]) for side in rows]
        print(f"trials lost: {len(names[0] - names[1])}")
        print(f"trials repeated: {len(repeated) + len(names[1] - names[0])}")
        print(f"optimizer steps done again: {redone.steps()} of {total}")
        print(f"best trial unchanged: {best[0] == best[1]}; all results equal: {rows[0] == rows[1]}")
        sys.exit(rows[0] != rows[1] or bool(repeated))


if __name__ == "__main__":
    main()
