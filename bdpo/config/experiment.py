"""Section `experiment`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from bdpo.section import RUNTIME_ONLY, Positive, Section

AboveZero = Annotated[float, Field(gt=0)]


class ExperimentConfig(Section):
    """What the experiments of the paper vary; see `bdpo.experiments.definitions`."""

    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        [0, 1, 2], min_length=1, description="of the trainings; all share the reference model and its scores"
    )
    alphas: list[AboveZero] = Field([0.5, 1.0, 1.5, 2.0, 2.5, 3.0], min_length=2, description="of `alpha`")
    betas: list[AboveZero] = Field([0.02, 0.05, 0.1, 0.2, 0.5], min_length=2, description="of `beta`")
    learning_rates: list[AboveZero] = Field(
        [],
        description="each arm takes the best of these, by the rule of section tune on the prompts of "
        "evaluate.part=search, and is compared with the others on the held-out prompts",
    )
    max_concurrent_arms: Annotated[Positive | None, RUNTIME_ONLY] = Field(
        None, description="by default as many as the cluster holds; under KubeRay it has to be set"
    )

    @field_validator("seeds", "alphas", "betas", "learning_rates")
    @classmethod
    def _nothing_twice(cls, values: list[float]) -> list[float]:
        if len(set(values)) < len(values):
            raise ValueError("names something twice")
        return values
