"""The 7B path on one NVIDIA GPU of 80 to 141 GB: correctness, speed, memory; nothing is downloaded.

    python -m benchmarks.gpu [correctness|scoring|training|trl|pipeline ...] [--out FOLDER] [--work FOLDER]
    python -m benchmarks.gpu --report --out FOLDER       # tables and RESULTS.md from the JSON alone, no GPU
    python -m benchmarks.gpu --smoke [PART ...]          # tiny, on the CPU: only that the code runs

Weights are random, of Qwen2-7B's shape and vocabulary. Every case of a part is a process of its own, so that
one that runs out of memory says so and the next has the whole GPU. Rows go to FOLDER/<part>.json as they are
measured, and a part ends after --limit seconds with those it has; --only TEXT runs the cases with TEXT in
their names and keeps the rows of the others. Exit code: 0 done; 2 no GPU, or wrong arguments; 1 a case failed
by something else than memory or what is not installed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import psutil
import torch

from bdpo.errors import UserError, first_line
from bdpo.models.oom import out_of_memory
from benchmarks.common import write_section
from benchmarks.gpu.record import NotMeasured, Record, Row, machine
from benchmarks.gpu.setup import Setup

PARTS = {
    "correctness": "correctness",
    "scoring": "scoring",
    "training": "training",
    "trl": "against_trl",
    "pipeline": "pipeline",
}


def main() -> int:
    """Run the parts, print their tables, write their sections."""
    arguments = parse()
    if arguments.case:
        return run_case(arguments)
    if not (arguments.smoke or arguments.report or torch.cuda.is_available()):
        print("error: torch sees no GPU; --smoke runs the same code tiny on the CPU", file=sys.stderr)
        return 2
    for part in arguments.parts:
        if not arguments.report:
            run_part(part, arguments)
    return max([show(part, record_of(part, arguments), arguments) for part in arguments.parts])


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, help="for the JSON files; runs/gpu, or runs/gpu-smoke")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "bdpo-gpu", help="for models; up to 40 GB"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with TEXT in their name")
    parser.add_argument("--limit", type=float, default=470, help="seconds of a part")
    parser.add_argument("--profile", action="store_true", help="tables of torch's profiler into --out")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing, write the report from the JSON files"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU; writes no RESULTS.md")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # what a process of its own is to measure
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if arguments.smoke and arguments.report:
        parser.error("--smoke measures nothing that --report could write")
    arguments.parts = arguments.parts or list(PARTS)
    arguments.out = arguments.out or Path("runs") / ("gpu-smoke" if arguments.smoke else "gpu")
    arguments.out = arguments.out.resolve()
    if arguments.smoke and not arguments.case:
        arguments.work /= "smoke"
    arguments.work = arguments.work.resolve()
    return arguments


def run_part(part: str, arguments: argparse.Namespace) -> None:
    """Run the requested cases until the time is over."""
    module, deadline = module_of(part), time.monotonic() + arguments.limit
    for case in (case for case in module.CASES if arguments.only in case):
        record = record_of(part, arguments)
        if hasattr(module, "wanted") and not module.wanted(case, record.rows):
            continue
        record.begin(case)
        left, began = deadline - time.monotonic(), time.monotonic()
        print(f"{part}: {case}", flush=True)
        lost = {"why": "no time was left for it"}
        if left > 10:
            lost = in_its_process(part, case, arguments, left)
        if lost:
            record_of(part, arguments).add({"case": case, **lost})
        print(f"{part}: {case}: {time.monotonic() - began:.0f} s {lost.get('why', '')}", flush=True)


def in_its_process(part: str, case: str, arguments: argparse.Namespace, seconds: float) -> Row:
    """Measure a case in a process of its own; returns why it did not come to an end, empty if it did."""
    command = [sys.executable, "-m", "benchmarks.gpu", part, "--case", case]
    command += ["--out", str(arguments.out), "--work", str(arguments.work)]
    command += [f"--{flag}" for flag in ("smoke", "profile") if getattr(arguments, flag)]
    first_gpu = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    process = subprocess.Popen(command, env=os.environ | first_gpu)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return {"why": f"cut off after {seconds:.0f} s, the limit of the part"}
    finally:
        end(process)
    if code < 0:
        return {"why": f"killed by signal {-code}, perhaps out of memory"}
    return {"why": f"its process ended with exit code {code}", "failed": True} if code else {}


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that is still there, and all that it started."""
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            if one.is_running():
                one.kill()
        process.wait()


def run_case(arguments: argparse.Namespace) -> int:
    """What the process of a case does: its rows go to the file one by one."""
    (part,), case = arguments.parts, arguments.case
    setup = Setup(arguments.work, arguments.out, machine(arguments.smoke), arguments.profile)
    setup.work.mkdir(parents=True, exist_ok=True)
    record = record_of(part, arguments)
    record.on(setup.machine)
    try:
        for row in module_of(part).measure(case, setup):
            record.add({"case": case, **row})
    except Exception as error:
        why = reason(error)
        if why.get("failed"):
            traceback.print_exc()
        record.add({"case": case, **why})
    return 0


def reason(error: Exception) -> Row:
    """Why a case has no numbers; `failed` if that should not be."""
    if out_of_memory(error):
        return {"why": f"out of memory: {first_line(error)}"}
    if isinstance(error, (NotMeasured, UserError)):
        return {"why": str(error)}
    return {"why": f"{type(error).__name__}: {first_line(error)}", "failed": True}


def show(part: str, record: Record, arguments: argparse.Namespace) -> int:
    """Print the table of a part and put it into RESULTS.md, unless it is of a smoke run; the exit code."""
    if not record.machine:
        print(f"\n{part}: nothing measured in {arguments.out}")
        return 1 if record.rows else 0
    lines = module_of(part).table(record.rows, record.machine)
    print(f"\n{part}: {record.head(part)}", *lines, sep="\n")
    if not record.machine["smoke"]:
        write_section(f"GPU: {part}", lines, record.head(part))
    return int(any(row.get("failed") for row in record.rows))


def module_of(part: str) -> Any:
    """Import a part when it is run: the parts require different packages."""
    return importlib.import_module(f"benchmarks.gpu.{PARTS[part]}")


def record_of(part: str, arguments: argparse.Namespace) -> Record:
    """The file of a part as it is now."""
    return Record(arguments.out / f"{part}.json")


if __name__ == "__main__":
    sys.exit(main())
