"""The very process of a worker is looked at, and killed."""

from __future__ import annotations

import subprocess

import psutil

from pipelines.runtime.node_processes import end_process, is_there
from tests.support.ray_nodes import wait_until


def test_only_the_very_process_is_killed():
    process = subprocess.Popen(["sleep", "600"])
    began = psutil.Process(process.pid).create_time()
    try:
        assert not end_process(process.pid, began + 1)
        assert process.poll() is None
        assert end_process(process.pid, began)
        assert process.wait(60) == -9
        assert not end_process(process.pid, began)
    finally:
        process.kill()


def test_a_process_that_has_ended_is_not_there_even_if_nobody_waited_for_it():
    process = subprocess.Popen(["sleep", "600"])
    began = psutil.Process(process.pid).create_time()
    try:
        assert is_there(process.pid, began)
        assert not is_there(process.pid, began + 1)
    finally:
        process.kill()
    wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE, "its end", 60)
    assert not is_there(process.pid, began)
    process.wait()
    assert not is_there(process.pid, began)
