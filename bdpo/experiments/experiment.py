"""What an experiment is: one declaration, from which its trainings, tables, CSV files and page are derived.

An experiment is declared in a module of this package and gets a line in `bdpo.experiments.definitions`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from bdpo.config import Config
from bdpo.experiments.arms import Arm
from bdpo.experiments.jobs import Job
from bdpo.reports.page import PageSection
from bdpo.storage.run_dir import RunDir


@dataclass(frozen=True)
class Finding:
    """A result that one experiment has beside the measures of the evaluation."""

    name: str
    """The name of its CSV file in the experiment's folder."""
    table: pa.Table
    sections: Sequence[PageSection] = ()
    """How the page shows it."""


@dataclass(frozen=True)
class Experiment:
    """Arms that are compared with each other, and what is measured of them.

    Every arm is trained at every seed of `experiment.seeds` and evaluated as section `evaluate` asks for; the
    page shows data, scores, training curves, measures and costs of each experiment.
    """

    title: str
    question: str
    arms: Callable[[Config], tuple[Arm, ...]] = lambda config: ()
    """The arms for a run; all are tested against the first. Without arms the pairs are scored, no more."""
    axis: str | None = None
    """The key that the arms vary, if its values make a curve."""
    rescores: bool = False
    """Whether the trained models score the pairs as the reference model did; see `arms.rescored`."""
    findings: Callable[[RunDir, Sequence[Job]], Sequence[Finding]] = lambda run, trained: ()
    """Results of the experiment's own, from the run and the jobs that are trained and evaluated."""
