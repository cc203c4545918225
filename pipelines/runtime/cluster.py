"""The Ray cluster of a command: joining it, and refusing what it can never hold."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from bdpo.config.reading import read_yaml
from bdpo.config.secrets import refuse_secrets
from bdpo.errors import UserError, first_line
from pipelines.runtime.ray_internals import CLUSTER_FILE, START_TIMED_OUT
from pipelines.runtime.signals import keep_handlers

STATE_TRACKING = "RAY_TRAIN_ENABLE_STATE_TRACKING"
"""The environment variable with which the dashboard's Train page shows a training."""


def connect() -> None:
    """Join the cluster that RAY_ADDRESS or a running `ray start` names, else start one on this machine.

    Token authentication is on everywhere; a local cluster gets a token of its own, see `protect_token`.

    Raises:
        UserError: this driver is a job whose runtime_env holds a secret; Ray does not start.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    # Ray uploads nothing about usage, and logs less: our own progress is on the terminal.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Checkpoints are committed, and dead workers noticed, when the controller looks: by default every 2 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Workers of a training and trials stay in the folder where all the paths of a config begin.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    import ray

    protect_token()
    if not ray.is_initialized():
        try:
            keep_handlers(_join_or_start)
        except Exception as error:
            if START_TIMED_OUT not in str(error):
                raise
            raise UserError(
                "Ray did not start on this machine within 30 seconds: the machine is overloaded, or Ray's "
                "processes end at once (see /tmp/ray/session_latest/logs); the same command tries again"
            ) from None
    os.environ.setdefault(STATE_TRACKING, "1")
    refuse_secrets(dict(ray.get_runtime_context().runtime_env), "runtime_env")


def _join_or_start() -> None:
    """A cluster that starts here has no dashboard: its eleven processes would end with this command."""
    import ray

    given = os.environ.get(STATE_TRACKING)
    os.environ.setdefault(STATE_TRACKING, "0")  # which the workers of a cluster that starts here inherit
    # What workers print stays in their log files: the terminal is for progress.
    context = ray.init(logging_level=logging.WARNING, log_to_driver=False, include_dashboard=False)
    if given is None and context.dashboard_url:
        os.environ[STATE_TRACKING] = "1"


def protect_token() -> None:
    """Let nobody else on this machine read the token of Ray's clusters, which admits to all of them.

    Ray itself makes the file readable for everybody. So it is made here, before Ray does, if this command may
    start a cluster; one that exists loses the permissions of others.

    Raises:
        UserError: it cannot be made.
    """
    if os.environ["RAY_AUTH_MODE"] != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    named = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    try:
        file = Path(named).expanduser()
        if not file.exists() and os.environ.get("RAY_ADDRESS", "local") == "local":
            _make_token(file)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        raise UserError(
            f"{named}: Ray's token cannot be made ({first_line(error)}); name a file that can be written in "
            "RAY_AUTH_TOKEN_PATH"
        ) from None
    with suppress(FileNotFoundError, PermissionError):  # a mounted secret may be read-only
        file.chmod(file.stat().st_mode & 0o700)


def _make_token(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent) as made:  # of mode 0600
        made.write(secrets.token_hex(32))
        made.flush()
        with suppress(FileExistsError):  # another command was faster
            os.link(made.name, file)


def require_capacity(
    stage: str,
    workers: int,
    gpus_per_worker: float,
    cpus_per_worker: float = 1,
    accelerator: str | None = None,
) -> None:
    """Refuse workers that the cluster can never hold, instead of waiting for them for ever.

    Raises:
        UserError: there is no room for `workers` of this size, whatever nodes the autoscaler adds.
    """
    each = {"CPU": cpus_per_worker, "GPU": gpus_per_worker}
    if accelerator:
        each[f"accelerator_type:{accelerator}"] = 0.001
    nodes = cluster_nodes()
    if nodes is None:
        return
    room = sum(count * _room(resources, each) for count, resources in nodes)
    if workers > room:
        size = " + ".join(f"{amount:g} {name}" for name, amount in each.items() if amount >= 0.01)
        on = f" on {accelerator}" if accelerator else ""
        raise UserError(
            f"{stage}: {workers} workers x {size}{on} do not fit the cluster, which has room for {room}; "
            f"lower {stage}.workers or {stage}.gpus_per_worker, or let it grow (max_workers in cluster.yaml)"
        )


def _room(resources: dict[str, float], each: dict[str, float]) -> int:
    """How many workers of a size one node can hold."""
    return min(int(resources.get(name, 0) / amount + 1e-9) for name, amount in each.items() if amount)


def cluster_nodes() -> list[tuple[int, dict[str, float]]] | None:
    """(how many, resources of each) of all nodes that the cluster can have; None where that cannot be known.

    Without an autoscaler these are the nodes that are there; with one, those of its node types. On
    Kubernetes the worker groups are known to KubeRay alone.
    """
    import ray

    file = CLUSTER_FILE.expanduser()
    if file.is_file():
        cluster = read_yaml(file)
        types, limit = cluster["available_node_types"], cluster["max_workers"]
        most = {name: min(node.get("max_workers", limit), limit) for name, node in types.items()}
        most[cluster["head_node_type"]] = 1
        return [(most[name], node["resources"]) for name, node in types.items()]
    if "RAY_CLUSTER_NAME" in os.environ:  # which KubeRay sets in its pods
        return None
    return [(1, dict(node["Resources"])) for node in ray.nodes() if node["Alive"]]
