"""Section `experiment`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from bdpo.config.base import Distinct
from bdpo.section import RUNTIME_ONLY, Positive, Section

AboveZero = Annotated[float, Field(gt=0)]


class ExperimentConfig(Section):
    """What the experiments of the paper vary; see `bdpo.experiments.definitions`."""

    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Distinct] = Field(
        [0, 1, 2], min_length=1, description="of the trainings; all share the reference model and its scores"
    )
    alphas: Annotated[list[AboveZero], Distinct] = Field(
        [0.5, 1.0, 1.5, 2.0, 2.5, 3.0], min_length=2, description="of `alpha`"
    )
    betas: Annotated[list[AboveZero], Distinct] = Field(
        [0.02, 0.05, 0.1, 0.2, 0.5], min_length=2, description="of `beta`"
    )
    learning_rates: Annotated[list[AboveZero], Distinct] = Field(
        [],
        description="each arm takes the best of these, by the rule of section tune on the prompts of "
        "evaluate.part=search, and is compared with the others on the held-out prompts",
    )
    max_concurrent_arms: Annotated[Positive | None, RUNTIME_ONLY] = Field(
        None, description="by default as many as the cluster holds; under KubeRay it has to be set"
    )
