"""The stages that make the results of a run, a line each, in their order.

The report, which reads their results and their costs, follows them in `pipelines.runtime.registry`.
"""

from __future__ import annotations

from pipelines.evaluate import EvaluateAdapter, EvaluateBase, EvaluateTrained
from pipelines.prepare import Prepare
from pipelines.runtime.stage import ManifestStage
from pipelines.score import Score
from pipelines.tamper import EvaluateTampered, Tamper
from pipelines.train import Train

STAGES: tuple[type[ManifestStage], ...] = (
    Prepare,
    Score,
    EvaluateBase,
    EvaluateAdapter,
    Train,
    EvaluateTrained,
    Tamper,
    EvaluateTampered,
)
