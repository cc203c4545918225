"""What every command has in common: arguments, exit codes, the Ray cluster, progress on the terminal."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bdpo.config import Config, load_config
from bdpo.config.reading import read_yaml
from bdpo.config.secrets import refuse_secrets
from bdpo.errors import UserError
from bdpo.models import with_sandbox_files
from bdpo.preflight import check_data, check_model
from bdpo.runs import RunDir
from bdpo.storage import StoragePath, discard, error_line
from bdpo.tokens import with_template

if TYPE_CHECKING:
    from ray.util.metrics import Gauge

console = Console()


def main(
    stage: Callable[..., object],
    what: str | None,
    results: Callable[..., list[StoragePath]],
    inspect: Callable[[Config, RunDir], object] | None = None,
    dry_run: Callable[[Config], object] | None = None,
    choice: Sequence[str] = (),
) -> None:
    """Run a stage as a command: exit 0 done, 2 wrong config, input or environment, 1 the run failed.

    `results` names what the stage makes in the run folder: what fresh=true discards. `inspect` is what
    `--inspect` does instead; it changes nothing and needs no lock. `dry_run` is what `--dry-run` does
    instead, without a run folder. Of `choice` the first argument names one, which `stage` and `results` get.
    """
    parser = argparse.ArgumentParser(
        description=what, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_EPILOG
    )
    if choice:
        parser.add_argument("name", choices=choice, metavar="NAME", help=", ".join(choice))
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over the file")
    if dry_run is not None:
        parser.add_argument("--dry-run", action="store_true", help="print what it needs, and do nothing")
    if inspect is not None:
        parser.add_argument("--inspect", action="store_true", help="show the finished results, run nothing")
    arguments = parser.parse_intermixed_args()
    chosen = [arguments.name] if choice else []
    with exit_codes():
        config = command_config(arguments.config, arguments.overrides)
        if dry_run is not None and arguments.dry_run:
            dry_run(config)
            return
        run = RunDir(config.run_dir)
        if inspect is not None and arguments.inspect:
            inspect(config, run)
            return
        with run.open(config):
            resolved = with_template(with_sandbox_files(config))
            if config.fresh:
                check_inputs(resolved)  # a typo must not cost a finished run
                discard(*results(run, *chosen))
            with clear_when_full(f"run_dir={run.root}"):
                stage(resolved, run, *chosen)
                run.record(config)


@contextmanager
def clear_when_full(what: str) -> Iterator[None]:
    """Say a full disk, quota or file system in one line, as the actors do; nothing of it is the run's fault.

    Raises:
        UserError: that.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(f"{what}: cannot be written ({error_line(error)})") from None


@contextmanager
def exit_codes() -> Iterator[None]:
    """End the command with 2 and one line where the user is to mend something, with 130 at Ctrl-C."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def command_config(file: str, overrides: Sequence[str]) -> Config:
    """The config of a command.

    Raises:
        UserError: it is wrong; or this is a job of a cluster, and its results would go with the job's folder.
    """
    config = load_config(file, overrides)
    lasts = "://" in config.run_dir or Path(config.run_dir).expanduser().is_absolute()
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not lasts:  # so Ray starts the command of a job
        raise UserError(
            f"run_dir={config.run_dir}: a job runs in a folder of its own, which does not last; give an "
            "absolute path, or a bucket"
        )
    return config


def check_inputs(config: Config) -> None:
    """Make sure that model, tokenizer and data can be read, before anything is discarded or begun.

    Raises:
        UserError: one of them cannot.
    """
    for check in (check_model, check_data):
        check(config, RunDir(config.run_dir))


_EPILOG = """\
The same command again resumes, and does nothing when all is done; fresh=true starts over.
exit code: 0 done; 2 wrong config, input or environment, said in one line; 1 the run failed;
130 interrupted"""


def connect() -> None:
    """Join the cluster that RAY_ADDRESS or a running `ray start` names, else start one on this machine.

    Token authentication is on everywhere; a local cluster makes its own token.

    Raises:
        UserError: this driver is a job whose runtime_env holds a secret.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    # Ray uploads nothing about usage, and says less: our own progress is on the terminal.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the run is on the dashboard's Train page
    # Workers of a training and trials stay in the folder where all the paths of a config begin.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    import ray

    if not ray.is_initialized():
        # What workers print stays in their log files: the terminal is for progress.
        ray.init(logging_level=logging.WARNING, log_to_driver=False)
    refuse_secrets(dict(ray.get_runtime_context().runtime_env), "runtime_env")


def require(
    stage: str,
    workers: int,
    gpus_per_worker: float,
    cpus_per_worker: float = 1,
    accelerator: str | None = None,
) -> None:
    """Refuse what the cluster can never hold, instead of waiting for it for ever.

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


# What `ray up` gives its autoscaler, on the head, where drivers of jobs run
CLUSTER_FILE = Path("~/ray_bootstrap_config.yaml")


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


@contextmanager
def progress_bar(title: str, total: int | None = None, done: int = 0) -> Iterator[Callable[..., None]]:
    """A bar on the terminal; calling what it yields moves it: `advance(rows, note="loss 0.61")`."""
    columns = (
        TextColumn("[bold]{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, completed=done, note="")
        begun = time.monotonic()

        def advance(steps: int, note: str = "") -> None:
            progress.update(task, advance=steps, note=note)
            completed = progress.tasks[task].completed
            _publish(title, completed, total, (completed - done) / (time.monotonic() - begun))

        yield advance


def _publish(stage: str, done: float, total: int | None, per_second: float) -> None:
    """Progress as metrics of Ray, for the dashboard and Prometheus, once Ray is there: counts alone."""
    if "ray" not in sys.modules:  # importing it here would be before `connect` has set its environment
        return
    import ray

    if ray.is_initialized():
        values = {"done": done, "total": total or 0, "per_second": per_second}
        for name, value in values.items():
            _gauge(name).set(value, tags={"stage": stage})


@cache
def _gauge(name: str) -> Gauge:
    from ray.util.metrics import Gauge

    what = {
        "done": "rows or steps done",
        "total": "rows or steps in all",
        "per_second": "rows or steps a second",
    }
    return Gauge(f"bdpo_stage_{name}", f"{what[name]}, by stage", tag_keys=("stage",))
