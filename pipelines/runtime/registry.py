"""All stages, a line each: those of the pipeline in their order, and the studies, which train many variants.

The command line, `status`, `preflight`, `run` and the page of a run know a stage from here alone.
"""

from __future__ import annotations

from pipelines.evaluate import EvaluateAdapter, EvaluateBase, EvaluateTrained
from pipelines.experiment import Experiment
from pipelines.prepare import Prepare
from pipelines.report import Report
from pipelines.runtime.stage import Stage
from pipelines.score import Score
from pipelines.train import Train
from tune.search import Search

PIPELINE: tuple[type[Stage], ...] = (
    Prepare,
    Score,
    EvaluateBase,
    EvaluateAdapter,
    Train,
    EvaluateTrained,
    Report,
)

STUDIES: tuple[type[Stage], ...] = (
    Search,
    Experiment,
)
