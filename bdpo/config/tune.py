"""Section `tune`."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from bdpo.section import RUNTIME_ONLY, Fraction, Positive, Section


class Range(Section):
    """All numbers from `min` to `max`; with `log`, drawn uniformly in the logarithm."""

    min: float
    max: float
    log: bool = False

    @model_validator(mode="after")
    def _not_empty(self) -> Range:
        if self.min >= self.max:
            raise ValueError(f"expects min < max, not min {self.min:g}, max {self.max:g}")
        if self.log and self.min <= 0:
            raise ValueError(f"log requires min > 0, not {self.min:g}")
        return self


def _sort(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<range>"


Choices = Annotated[list[bool | int | float | str], Field(min_length=1)]
Dimension = Annotated[
    Annotated[Range, Tag("<range>")] | Annotated[Choices, Tag("<list>")], Discriminator(_sort)
]


def _dotted(space: Any) -> Any:
    """`{method: {alpha: …}}`, as `tune.space.method.alpha=…` gives it, becomes `{method.alpha: …}`."""
    if not isinstance(space, dict):
        return space
    flat: dict[Any, Any] = {}
    for key, value in space.items():
        if isinstance(value, dict) and any(isinstance(part, dict | list) for part in value.values()):
            flat |= {f"{key}.{name}": part for name, part in _dotted(value).items()}
        else:
            flat[key] = value
    return flat


class TuneConfig(Section):
    """The search for the safest model that still answers benign requests."""

    space: Annotated[dict[str, Dimension], BeforeValidator(_dotted)] = Field(
        {"method.alpha": Range(min=0.5, max=3.0), "method.beta": Range(min=0.02, max=0.5, log=True)},
        min_length=1,
        description="dotted key of method or train -> {min, max, log} or a list of values",
    )
    searcher: Literal["optuna", "random", "grid"] = Field("optuna", description="optuna: TPE")
    num_samples: Annotated[Positive, RUNTIME_ONLY] = Field(
        16, description="trials; a grid has all of its own"
    )
    metric: str = Field("strongreject.safety", description="benchmark.measure to be as high as possible")
    constraint: str = Field("xstest.compliance", description="benchmark.measure that is bounded from below")
    max_over_refusal: Fraction = Field(
        0.05, description="how far the constraint may be below that of the base model"
    )
    max_broken: Fraction = Field(
        0.1, description="how many more of the answers may be broken than of the base model's, as a share"
    )
    rungs: list[float] = Field(
        [0.25, 0.5, 1.0], min_length=1, description="shares of a trial's steps after which it is evaluated"
    )
    reduction_factor: float = Field(
        2.0, gt=1, description="ASHA: of n trials at a rung n / this are promoted"
    )
    rung_limit: Positive = Field(100, description="prompts of each benchmark at rungs before the last")
    max_concurrent_trials: Annotated[Positive | None, RUNTIME_ONLY] = Field(
        None, description="by default as many as the cluster holds; under KubeRay it has to be set"
    )
    max_failures: Annotated[int, RUNTIME_ONLY] = Field(
        2, ge=0, description="retries of a trial after faults that are not its own"
    )

    @field_validator("rungs")
    @classmethod
    def _rising_to_1(cls, rungs: list[float]) -> list[float]:
        if rungs[-1] != 1 or rungs[0] <= 0 or any(low >= high for low, high in pairwise(rungs)):
            raise ValueError("expects rising shares above 0, the last of them 1.0")
        return rungs

    @model_validator(mode="after")
    def _grid_of_lists(self) -> TuneConfig:
        for key, dimension in self.space.items():
            if self.searcher == "grid" and isinstance(dimension, Range):
                raise ValueError(f"searcher=grid requires lists, and space has a range for {key}")
        return self
