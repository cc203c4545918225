"""Processes forked from a server in which torch and DeepSpeed are imported already."""

from __future__ import annotations

import importlib
import multiprocessing
from typing import Any

WORKER = "tests.support.train_worker"

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([WORKER])


def train_process(*arguments: Any) -> multiprocessing.process.BaseProcess:
    """A process, not yet started, that calls `tests.support.train_worker.work`."""
    return _FORKS.Process(target=_work, args=arguments)


def _work(*arguments: Any) -> None:
    """In the new process; the one of the tests does not import the module, which takes seconds."""
    importlib.import_module(WORKER).work(*arguments)
