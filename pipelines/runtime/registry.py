"""All stages: those of the pipeline in their order, the studies, which train many variants, and the attacks.

The command line, `status`, `preflight`, `run` and the page of a run know a stage from here alone.
"""

from __future__ import annotations

from pipelines.attack import AttackBase, AttackTrained
from pipelines.experiment import ExperimentStage
from pipelines.report import Report
from pipelines.runtime.stage import Stage
from pipelines.runtime.stages import STAGES
from tune.search import Search

PIPELINE: tuple[type[Stage], ...] = (*STAGES, Report)

STUDIES: tuple[type[Stage], ...] = (Search, ExperimentStage)

ATTACKS: tuple[type[Stage], ...] = (AttackBase, AttackTrained)
