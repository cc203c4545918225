"""What every command has in common: arguments, exit codes, the run folder's lock."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from bdpo.config import Config, load_config
from bdpo.errors import StorageUnavailable, UserError, error_line
from bdpo.models.tokenizer import with_template
from bdpo.sandbox import with_sandbox_files
from bdpo.storage.lease import Held
from bdpo.storage.paths import discard, local_path
from bdpo.storage.run_dir import RunDir
from pipelines.presets import preset_file, with_preset_template
from pipelines.runtime.progress import for_terminal
from pipelines.runtime.ray_internals import JOB_VARIABLE, full_node_line, storage_unavailable
from pipelines.runtime.signals import interruptible
from pipelines.runtime.stage import Stage, check_inputs, complete_all, outputs_of
from pipelines.runtime.stalls import NoRoom

_OPTIONS = {
    "inspect": "show the finished results, run nothing",
    "dry_run": "print what it needs, and do nothing",
}
"""Methods of a stage that the command line offers as options: they change nothing and need no lock."""


@dataclass(frozen=True)
class Command:
    """A command over a run folder: it completes some stages. Calling the object is the command line.

    Exit 0 done; 2 wrong config, input or environment; 1 the run failed. `--inspect` and `--dry-run` exist if
    a stage has them. `completed_by`, called with config and run folder, completes the stages in its own way.
    Of `choice` the first argument names one, which each stage gets as a third argument.
    `requires`, called with config and run folder, refuses what the command cannot work with, before the
    inputs of the stages are checked. `fresh=true` then discards what the stages make, but for `keeps`.
    """

    what: str | None
    stages: Sequence[type[Stage]]
    completed_by: Callable[[Config, RunDir], object] | None = None
    choice: Sequence[str] = ()
    requires: Callable[[Config, RunDir], object] | None = None
    keeps: Sequence[type[Stage]] = ()

    def __call__(self, arguments: Sequence[str] | None = None) -> None:
        """Do what the arguments ask for, by default those of the process."""
        given = self._parser().parse_intermixed_args(arguments)
        chosen = [given.name] if self.choice else []
        with exit_codes():
            config = command_config(given.config or preset_file(given.preset), given.overrides)
            run = RunDir(config.run_dir)
            for option in _OPTIONS:
                if getattr(given, option, False):
                    for stage in self._having(option):
                        getattr(stage(config, run, *chosen), option)()
                    return
            self.complete(config, *chosen)

    def complete(self, config: Config, *chosen: str) -> None:
        """Complete the stages in the run folder of a config, as a function: no signals, no exit codes.

        Raises:
            UserError: config, input or environment is wrong, or another command works in the run folder.
            Exception: whatever else made the run fail.
        """
        run = RunDir(config.run_dir)
        with run.open(config) as held, one_line_when_lost(held):
            self._work(config, run, *chosen)

    def _work(self, config: Config, run: RunDir, *chosen: str) -> None:
        """Complete the stages, in a run folder that is this command's alone."""
        resolved = with_template(with_sandbox_files(config))
        stages = [stage(resolved, run, *chosen) for stage in self.stages]
        if self.requires is not None:
            self.requires(resolved, run)
        check_inputs(stages)  # before the first stage; and a typo must not cost a finished run
        if config.fresh:
            discard(*outputs_of(stage for stage in stages if type(stage) not in self.keeps))
        with one_line_when_full(f"run_dir={run.root}"):
            if self.completed_by is None:
                complete_all(stages)
            else:
                self.completed_by(resolved, run)
            run.record(config)

    def _parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(
            description=self.what, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_EPILOG
        )
        if self.choice:
            parser.add_argument("name", choices=self.choice, metavar="NAME", help=", ".join(self.choice))
        source = parser.add_mutually_exclusive_group(required=True)
        source.add_argument("--config", metavar="FILE", help="YAML file of the run")
        source.add_argument("--preset", metavar="NAME", help="a config of this package, see `bdpo presets`")
        parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over the file")
        for option, what in _OPTIONS.items():
            if self._having(option):
                parser.add_argument(f"--{option.replace('_', '-')}", action="store_true", help=what)
        return parser

    def _having(self, option: str) -> list[type[Stage]]:
        """The stages that have an option of their own."""
        return [stage for stage in self.stages if getattr(stage, option) is not getattr(Stage, option)]


@contextmanager
def one_line_when_full(what: str) -> Iterator[None]:
    """Report a full disk, quota or file system in one line, as the actors do: the run is not at fault.

    Raises:
        UserError: one of them is full; `what` names what cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(f"{what}: cannot be written ({error_line(error)})") from None


@contextmanager
def one_line_when_lost(held: Held) -> Iterator[None]:
    """Report a deleted run folder, or lock, in one line, whatever the command met first.

    Raises:
        UserError: the lock is lost.
    """
    try:
        yield
    except Exception:
        if (loss := held.loss()) is None:
            raise
        raise UserError(f"{loss}; when that is put right the same command resumes") from None


@contextmanager
def exit_codes() -> Iterator[None]:
    """End the command with 2 and one line if the user can correct what is wrong, or as a signal requires.

    Object storage that gives no answer and a cluster without room end it with 2, a node whose memory was full
    with 1: one line as well.
    """
    with interruptible():
        try:
            yield
        except (UserError, StorageUnavailable, NoRoom) as error:
            _refuse(error)
        except Exception as error:
            unavailable = storage_unavailable(error) if "ray" in sys.modules else None
            if unavailable is not None:
                _refuse(unavailable)
            full = full_node_line(error) if "ray" in sys.modules else None
            if full is None:
                raise
            print(
                f"error: {for_terminal(full)}; Ray ended processes of this run there. With fewer or smaller "
                "workers, or when the other processes are gone, the same command resumes",
                file=sys.stderr,
            )
            sys.exit(1)


def _refuse(error: Exception) -> NoReturn:
    """End the command with exit code 2 and the line of the error."""
    print(f"error: {for_terminal(str(error))}", file=sys.stderr)
    sys.exit(2)


def command_config(file: str | Path, overrides: Sequence[str]) -> Config:
    """The config of a command.

    Raises:
        UserError: it is wrong; or this is a job of a cluster, and its results would go with the job's folder.
    """
    config = with_preset_template(load_config(file, overrides))
    lasts = "://" in config.run_dir or local_path(config.run_dir).is_absolute()
    if JOB_VARIABLE in os.environ and not lasts:
        raise UserError(
            f"run_dir={config.run_dir}: a job runs in a folder of its own, which does not last; give an "
            "absolute path, or a bucket"
        )
    return config


_EPILOG = """\
The same command again resumes, and does nothing when all is done; fresh=true starts over.
exit code: 0 done; 2 wrong config, input or environment, reported in one line; 1 the run failed;
130 interrupted (SIGINT), 143 terminated (SIGTERM)"""
