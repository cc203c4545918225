"""What every command has in common: arguments, exit codes, the Ray cluster, progress on the terminal."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bdpo.cluster.preflight import check_data, check_model
from bdpo.config import Config, load_config
from bdpo.errors import UserError, error_line
from bdpo.models.tokenizer import with_template
from bdpo.sandbox import with_sandbox_files
from bdpo.storage.paths import StoragePath, discard
from bdpo.storage.run_dir import RunDir


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
