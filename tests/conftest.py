"""How the tests run: their environment, their order, and the fixtures of `tests.support.fixtures`."""

from __future__ import annotations

import functools
import gc
import os
import secrets
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from xdist.scheduler import LoadFileScheduling

os.environ["RAY_ADDRESS"] = "local"  # no test joins another cluster of this machine
# Ray reads these when it is first imported, whatever test that is, and never again.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
# Ray's workers would wait for every other process of the machine: for the other tests that run at the time.
os.environ |= {"RAY_worker_niceness": "0"}

# Several test files run at a time, on as few as two cores: more threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
# Those that a training has nevertheless, for states in the memory of the CPU, wait without computing.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def pytest_configure(config: pytest.Config) -> None:
    """Import what tests share, which takes seconds: not in the process that only hands tests to others."""
    gc.disable()  # nothing of what is imported and collected becomes garbage
    if config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("tests.support.fixtures")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    """The files of a room with tests of the marker `ray` go to one process: a cluster costs more than these.

    Not so those of whole pipelines, which take long themselves.
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    @functools.cache
    def is_on_ray(file: str) -> bool:
        return not file.startswith("tests/system/") and "mark.ray" in (config.rootpath / file).read_text()

    class OneClusterARoom(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return f"ray in {file.rpartition('/')[0]}" if is_on_ray(file) else file

    return OneClusterARoom(config, log)


def pytest_itemcollected(item: pytest.Item) -> None:
    """A test with the marker `ray` gets the cluster of the session before all its other fixtures."""
    if item.get_closest_marker("ray"):
        item.fixturenames.insert(0, "ray_session")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that take longest begin first; the order of the others stays."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """From here on there is garbage, but not among what is there already."""
    gc.freeze()
    gc.enable()
