"""All stages: those of the pipeline in their order, the studies, which train many variants, and the attacks.

`run`, `status` and `preflight` know a stage from here alone. A command names the stages that it completes
itself, and `COMMANDS` in `pipelines.__main__` the commands.
"""

from __future__ import annotations

from pipelines.attack import ATTACKS
from pipelines.experiment import ExperimentStage
from pipelines.report import Report
from pipelines.runtime.stage import Stage
from pipelines.runtime.stages import STAGES
from tune.search import Search

PIPELINE: tuple[type[Stage], ...] = (*STAGES, Report)

STUDIES: tuple[type[Stage], ...] = (Search, ExperimentStage)

__all__ = ["ATTACKS", "PIPELINE", "STUDIES"]
