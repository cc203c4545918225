"""Ray nodes as processes of their own, with ports, token and folder of their own; killed as a machine dies.

Never `ray stop`: it ends every Ray on the machine. A node is a process group, and ends with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import requests

from bdpo.storage.cache import cache_folder
from pipelines.runtime.cluster import STATE_TRACKING
from tests.support import ROOT

RAY = [sys.executable, "-m", "ray.scripts.scripts"]

# A machine that is gone is known to be gone after some 10 seconds, not 30.
NOTICED_SOON = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "10",
}

# Workers begin when something runs in them: those that a node begins with are not of a test's environment.
ON_DEMAND = {"RAY_prestart_worker_first_driver": "0"}

# Of a head: what no command of a test speaks to.
WITHOUT_SERVICES = ["--include-dashboard=false", "--include-log-monitor=false", "--no-monitor"]


def wait_until(true: Callable[[], Any], what: str, seconds: float = 600, every: float = 0.2) -> Any:
    """What `true` returns once it is true; it is asked `every` so many seconds."""
    end = time.monotonic() + seconds
    while not (found := true()):
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(every)
    return found


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Nodes:
    """A head without CPUs, its jobs API on loopback, and nodes that come and go; the token is on."""

    def __init__(self, folder: Path) -> None:
        self.port, self.dashboard, self.client_port = free_ports(3)
        self.url = f"http://127.0.0.1:{self.dashboard}"
        self.folder = folder
        self.names = 0
        token = secrets.token_hex(16)
        (folder / "token").write_text(token)
        self.authorized = {"Authorization": f"Bearer {token}"}
        self.environment = {
            **{name: os.environ[name] for name in os.environ if not name.startswith(("RAY_", "PYTHONPATH"))},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            **NOTICED_SOON,
            "BDPO_CACHE": str(cache_folder()),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        self.running: list[subprocess.Popen[bytes]] = []

    def begin(self) -> None:
        """Start the head."""
        head = ["--head", f"--port={self.port}", "--dashboard-host=127.0.0.1"]
        head += [f"--dashboard-port={self.dashboard}", f"--ray-client-server-port={self.client_port}"]
        self._start(*head, "--num-cpus=0", folder=self.folder)
        wait_until(self._takes_jobs, "the jobs API", 120)

    def add(self, cpus: int) -> subprocess.Popen[bytes]:
        """A node that joins; returns its process group's first process."""
        self.names += 1
        name = f"node{self.names}"
        # In one folder each node would put the job's working directory in the place of the others'.
        node = self._start(
            f"--address=127.0.0.1:{self.port}",
            f"--num-cpus={cpus}",
            f'--resources={{"{name}": 1}}',
            folder=self.folder / name,
        )
        wait_until(lambda: any(name in there["resources_total"] for there in self.alive()), name)
        return node

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """As if its plug were pulled."""
        end_node(node)
        self.running.remove(node)

    def end(self) -> None:
        for node in reversed(self.running):
            end_node(node)

    def get(self, path: str) -> requests.Response:
        """An answer of the dashboard, with the token."""
        return requests.get(self.url + path, headers=self.authorized, timeout=60)

    def alive(self) -> list[dict[str, Any]]:
        nodes = self.get("/api/v0/nodes").json()["data"]["result"]["result"]
        return [node for node in nodes if node["state"] == "ALIVE"]

    def metrics(self) -> str:
        """What the nodes answer to Prometheus."""
        targets = json.loads((self.folder / "prom_metrics_service_discovery.json").read_text())[0]["targets"]
        said = []
        for target in targets:
            with suppress(requests.ConnectionError):  # a node that died is listed for a while
                said.append(requests.get(f"http://{target}/metrics", timeout=60).text)
        return "".join(said)

    @contextmanager
    def submitting(
        self, *command: str, options: Sequence[str] = (), **environment: str
    ) -> Iterator[subprocess.Popen[str]]:
        """`ray job submit --working-dir . -- command`; all that it prints is its stdout.

        It ends with the block: a test that failed does not wait for a job that hangs.
        """
        arguments = [*RAY, "job", "submit", f"--address={self.url}", "--working-dir=.", *options, "--"]
        with subprocess.Popen(
            [*arguments, *command],
            cwd=ROOT,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as job:
            try:
                yield job
            finally:
                job.kill()

    def submit(self, *command: str, options: Sequence[str] = (), **environment: str) -> tuple[int, str]:
        """The same to its end: exit code and what it printed."""
        with self.submitting(*command, options=options, **environment) as job:
            printed, _ = job.communicate(timeout=1200)
        return job.returncode, printed

    def _takes_jobs(self) -> bool:
        """The API answers before the head's agent, which runs the jobs, is there."""
        try:
            return requests.post(
                f"{self.url}/api/jobs/", json={"entrypoint": "true"}, headers=self.authorized
            ).ok
        except requests.ConnectionError:
            return False

    def _start(self, *arguments: str, folder: Path) -> subprocess.Popen[bytes]:
        # The agent's own default is one fixed port, and other Rays may be on this machine.
        agent = f"--dashboard-agent-listen-port={free_ports(1)[0]}"
        log = self.folder / "start.log"
        node = start_node(agent, f"--temp-dir={folder}", *arguments, environment=self.environment, log=log)
        self.running.append(node)
        return node


def start_node(*arguments: str, environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """`ray start` as a process group of its own, which ends when the process of the tests is gone."""
    command = [*RAY, "start", "--block", "--object-store-memory=100000000", *arguments]
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=output,
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM, at which `ray start` ends its processes, when the parent dies."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def end_node(node: subprocess.Popen[bytes]) -> None:
    """As if its plug were pulled: every process of it at once."""
    os.killpg(node.pid, signal.SIGKILL)
    node.wait()


@contextmanager
def session_node(cpus: int = 4, **variables: str) -> Iterator[tuple[str, Path]]:
    """One node without dashboard; yields the address that commands join, and the folder of its logs.

    It has more CPUs than a small machine, so that no test waits for another one's actors.
    """
    with _short_folder() as folder:
        port, log = free_ports(1)[0], folder / "start.log"
        environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
        # Ray kills workers when the machine runs out of memory, whoever took it.
        environment |= {"RAY_memory_monitor_refresh_ms": "0", STATE_TRACKING: "0", **ON_DEMAND, **variables}
        head = ["--head", f"--port={port}", f"--num-cpus={cpus}", *WITHOUT_SERVICES]
        node = _started_node(*head, f"--temp-dir={folder}", environment=environment, log=log)
        try:
            yield f"127.0.0.1:{port}", folder
        finally:
            end_node(node)


def _started_node(*arguments: str, environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """A node that has started; Ray gives up after 30 seconds, which a busy machine may need, so thrice."""
    for _ in range(3):
        node = start_node(*arguments, environment=environment, log=log)
        wait_until(lambda: "Ray runtime started" in log.read_text() or node.poll() is not None, "Ray")  # noqa: B023
        if node.poll() is None:
            return node
    raise AssertionError(log.read_text())


@contextmanager
def _short_folder() -> Iterator[Path]:
    """With a short name: Ray's sockets lie below it, and the path of a socket may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def nodes() -> Iterator[Nodes]:
    """A cluster of nodes as processes of their own; it ends with the block."""
    with _short_folder() as folder:
        cluster = Nodes(folder)
        try:
            cluster.begin()
            yield cluster
        finally:
            cluster.end()
