"""What every command has in common: arguments, exit codes, the Ray cluster, progress on the terminal."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
from bdpo.errors import UserError
from bdpo.models import with_sandbox_files
from bdpo.runs import RunDir
from bdpo.sources import read_rows
from bdpo.storage import StoragePath, discard
from bdpo.tokens import load_tokenizer, with_template

console = Console()


def main(
    stage: Callable[[Config, RunDir], object],
    what: str | None,
    results: Callable[[RunDir], list[StoragePath]],
    inspect: Callable[[Config, RunDir], object] | None = None,
    dry_run: Callable[[Config], object] | None = None,
) -> None:
    """Run a stage as a command: exit 0 done, 2 wrong config, input or environment, 1 the run failed.

    `results` names what the stage makes in the run folder: what fresh=true discards. `inspect` is what
    `--inspect` does instead; it changes nothing and needs no lock. `dry_run` is what `--dry-run` does
    instead, without a run folder.
    """
    parser = argparse.ArgumentParser(
        description=what, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_EPILOG
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over the file")
    if dry_run is not None:
        parser.add_argument("--dry-run", action="store_true", help="print what it needs, and do nothing")
    if inspect is not None:
        parser.add_argument("--inspect", action="store_true", help="show the finished results, run nothing")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
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
                discard(*results(run))
            stage(resolved, run)
            run.record(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def check_inputs(config: Config) -> None:
    """Make sure that model, tokenizer and data can be read, before anything is discarded or begun.

    Raises:
        UserError: one of them cannot.
    """
    load_tokenizer(config.model)
    next(iter(read_rows(config.data)), None)


_EPILOG = """\
The same command again resumes, and does nothing when all is done; fresh=true starts over.
exit code: 0 done; 2 wrong config, input or environment, said in one line; 1 the run failed"""


def connect() -> None:
    """Join the cluster that RAY_ADDRESS or a running `ray start` names, else start one on this machine.

    Token authentication is on everywhere; a local cluster makes its own token.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    # Ray uploads nothing about usage, and says less: our own progress is on the terminal.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    if not ray.is_initialized():
        # What workers print stays in their log files: the terminal is for progress.
        ray.init(logging_level=logging.WARNING, log_to_driver=False)


def require(stage: str, workers: int, gpus_per_worker: float, cpus_per_worker: float = 1) -> None:
    """Refuse what the cluster can never give, instead of waiting for it for ever.

    Raises:
        UserError: `workers` of this size exceed all that the cluster has now.
    """
    import ray

    total = ray.cluster_resources()
    for resource, each in (("GPU", gpus_per_worker), ("CPU", cpus_per_worker)):
        if workers * each > total.get(resource, 0):
            raise UserError(
                f"{stage}: {workers} workers x {each:g} {resource} do not fit the cluster's "
                f"{total.get(resource, 0):g} {resource}; lower {stage}.workers or {stage}.gpus_per_worker"
            )


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

        def advance(steps: int, note: str = "") -> None:
            progress.update(task, advance=steps, note=note)

        yield advance
