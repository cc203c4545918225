"""The facts that a node reports about itself; a light module, which the preflight imports on every node."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bdpo.errors import error_line
from bdpo.storage.paths import local_path, read_text
from bdpo.storage.records import versions
from bdpo.storage.run_dir import RunDir


@dataclass(frozen=True)
class NodeFacts:
    """One node: its address, versions by package, names of environment variables, free disk, memory, GPUs.

    `missing` are the driver's files that the node lacks. `storage_error` is the error when the node read the
    note that the driver had written to the run folder, None if there was none.
    """

    address: str
    versions: dict[str, str]
    auth_mode: str | None
    variables: frozenset[str]
    scratch_gib: float
    memory_gib: float
    gpu_gib: tuple[float, ...]
    missing: tuple[str, ...]
    storage_error: str | None


def node_facts(address: str, run_dir: str | None, nonce: str, files: Sequence[str]) -> NodeFacts:
    """Collect the facts; runs on the node. `nonce` is the content of the driver's note in the run folder."""
    return NodeFacts(
        address,
        versions(),
        os.environ.get("RAY_AUTH_MODE"),
        frozenset(os.environ),
        shutil.disk_usage(tempfile.gettempdir()).free / 2**30,
        _memory_gib(),
        _gpu_gib(),
        tuple(file for file in files if not local_path(file).exists()),
        _storage_error(RunDir(run_dir), nonce) if run_dir else "was not asked",
    )


def _storage_error(run: RunDir, nonce: str) -> str | None:
    try:
        if read_text(run.root / f".preflight-{nonce}") != nonce:
            return "reads another content there"
    except FileNotFoundError:
        return "does not see what the driver wrote there"
    except Exception as error:  # every protocol of fsspec has errors of its own
        return f"cannot read it ({error_line(error)})"
    return None


def _memory_gib() -> float:
    """Memory of the machine in GiB, or the limit of its container if that is less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int(Path(file).read_text()))
    return min(limits) / 2**30


def _gpu_gib() -> tuple[float, ...]:
    """Memory of each GPU in GiB, by nvidia-smi: it sees the GPUs that Ray hides from a task without GPUs.

    A GPU whose memory is unknown is left out: one without a driver, or one that shares the host's memory.
    """
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ()
    found = []
    for line in shown.stdout.splitlines():
        with suppress(ValueError):
            found.append(float(line) / 1024)
    return tuple(found)
