"""What the engine of experiments and searches, `pipelines.runtime.variants`, expects of their variants.

An experiment's arms and a search's trials differ in what they train, when they are evaluated and who chooses
the next one: that is their `Variants`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from bdpo.variants.ends import Failure
from pipelines.runtime.work_times import Begins

if TYPE_CHECKING:
    from rich.table import Table


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

    def runner(self, name: str, begins: Begins) -> Runner:
        """What runs the variant of this name; called in the process that runs it.

        It calls `begins` whenever it begins something, as the process is watched.
        """

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
    stall_seconds: float = 60.0
    """The least limit of what such a process does, see `pipelines.runtime.stalls`."""
