"""Commands as a user gives them: in this process, where a new one would show nothing more."""

from __future__ import annotations

import io
import os
import runpy
import signal
import subprocess
import sys
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress
from typing import Any, NamedTuple
from unittest import mock

import psutil

from tests.support import ROOT


class Ended(NamedTuple):
    """How a command ended: its exit code, and what it printed."""

    code: int
    out: str
    err: str


def run_command(module: str, *arguments: object) -> Ended:
    """`python -m module arguments` in this process, where a cluster that it joins stays joined."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    interrupts = signal.getsignal(signal.SIGINT)  # Ray Train puts a handler of its own in its place
    with (
        mock.patch.object(sys, "argv", [module, *map(str, arguments)]),
        warnings.catch_warnings(action="ignore", category=RuntimeWarning),  # the module is imported already
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:
            code = 1
            traceback.print_exc()
        finally:
            signal.signal(signal.SIGINT, interrupts)
    return Ended(code, out.getvalue(), err.getvalue())


def start_alone(*arguments: object, **variables: str) -> subprocess.Popen[str]:
    """`python arguments` with a Ray cluster of its own, whichever the tests of this process joined."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": "local"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_with_cluster(driver: subprocess.Popen[Any]) -> None:
    """kill -9 of a command that started a Ray cluster, which dies with it; returns when all of it is gone.

    Ray's two agents are killed: they die with their raylet as well, but after a minute, in which they try to
    report its end to a GCS that is gone.
    """
    cluster = psutil.Process(driver.pid).children(recursive=True)
    assert any(process.name() == "raylet" for process in cluster), "its cluster is another's"
    driver.kill()
    driver.wait()
    for process in cluster:
        with suppress(psutil.NoSuchProcess):
            if "Agent" in "".join(process.cmdline()):
                process.kill()
    _, left = psutil.wait_procs(cluster, timeout=600)
    assert not left
