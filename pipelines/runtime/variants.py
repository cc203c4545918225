"""The engine of experiments and searches: Ray Tune runs variants at the same time and retries them.

An experiment's arms and a search's trials differ in what they train, when they are evaluated and who chooses
the next one: that is their `Variants`. All else is the same and stands here: how many run at the same time,
the actors that run them, retries, the record of how each ends, the table on the terminal, the interrupt.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rich.live import Live

from bdpo.cluster.placement import max_concurrent
from bdpo.storage.paths import StoragePath, arrow_filesystem, discard
from bdpo.variants.ends import Failure
from pipelines.runtime.cluster import cluster_nodes, connect
from pipelines.runtime.progress import console

if TYPE_CHECKING:
    from rich.table import Table

    from bdpo.config import Config
    from bdpo.storage.run_dir import RunDir


class Runner(Protocol):
    """One variant in the process that runs it. What is done already, it does not do again."""

    name: str

    def next_rung(self) -> bool:
        """Train the variant to its next rung and evaluate it there; whether the variant is at its end.

        Raises:
            InvalidEvaluation: too many verdicts are missing; they alone are asked for when it is retried.
        """

    def stop_training(self) -> None:
        """End the training: another process is about to resume the variant."""

    def end(self) -> None:
        """End the training, if it still runs, and remove what an ended variant no longer requires."""


class Variants(Protocol):
    """The variants of a command. All answers are read from files, so that a killed command resumes."""

    title: str
    """How the terminal calls them: `arms`, `trials`."""

    def open_names(self) -> list[str]:
        """The names of the variants that are to be run, or resumed."""

    def missing(self) -> int:
        """How many variants have no name yet."""

    def next_name(self) -> str:
        """The name of a new variant."""

    def runner(self, name: str) -> Runner:
        """What runs the variant of this name; called in the process that runs it."""

    def is_promoted(self, name: str) -> bool:
        """Whether a variant continues after the rung that it has reached, or is stopped early."""

    def record_failure(self, name: str, failure: Failure) -> None:
        """Record that the variant has no result."""

    def table(self) -> Table:
        """How far every variant is, for the terminal."""


@dataclass(frozen=True)
class Limits:
    """How the variants of a command share a cluster."""

    concurrent: int
    """Variants at the same time."""
    max_failures: int
    """Retries of a variant after faults that are not its own."""
    gpus: float = 0.0
    """The share of a GPU that the process of a variant holds as long as it runs, to evaluate with."""


def require_room(config: Config, run: RunDir, todo: int, key: str, share: float = 0.0) -> int:
    """How many of `todo` variants run at the same time, at most the value of `key`; see `max_concurrent`.

    Raises:
        UserError: the cluster can never hold one; nothing has been scored or trained by then.
    """
    from pipelines.preflight import refuse_what_does_not_fit
    from pipelines.runtime.plan_table import require_memory

    require_memory(config)
    refuse_what_does_not_fit(config, run)
    return max_concurrent(config, cluster_nodes(), todo, key, share)


def run_variants(variants: Variants, folder: StoragePath, todo: int, limits: Limits) -> None:
    """Run `todo` variants; each is at its end afterwards, or its failure is recorded.

    `folder` is for Tune's own files, which are removed at the end: a resumed command reads those of the
    variants alone.
    """
    connect()
    from pipelines.runtime.variant_actor import tuner_of

    # Tune's own files, tables and tracebacks would repeat what the variants' files and table show.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # else Tune returns, as if all variants were done
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    discard(folder / "ray")
    console.print(f"[bold]{variants.title:<9}[/] {todo} to do, {limits.concurrent} at the same time")
    tuner = tuner_of(variants, arrow_filesystem(folder), todo, limits)
    with Live(get_renderable=variants.table, console=console, refresh_per_second=1, transient=True):
        tuner.fit()
    discard(folder / "ray")
