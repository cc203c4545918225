"""A gate file: the conditions that the evaluations of a run have to meet, for a team's CI.

It is a file of its own and no section of a run's config: one gate is held against many runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from bdpo.config.evaluate import AlignedName, ModelName
from bdpo.config.explain import explain
from bdpo.config.reading import read_yaml, require_tree
from bdpo.errors import UserError
from bdpo.section import Fraction, Section

Bound = Literal["at_least", "at_most", "max_regression"]

BOUNDS: tuple[Bound, ...] = ("at_least", "at_most", "max_regression")


class Condition(Section):
    """A condition on one measure. It has exactly one of `at_least`, `at_most` and `max_regression`."""

    measure: str = Field(
        description="benchmark.measure, as `strongreject.safety`; of a capability benchmark `gsm8k.accuracy`"
    )
    category: str | None = Field(
        None, description="one category of the benchmark, by name; without it all of them"
    )
    at_least: Fraction | None = Field(None, description="of a measure of which more is better")
    at_most: Fraction | None = Field(None, description="of a measure of which less is better")
    max_regression: Fraction | None = Field(
        None,
        description="how much worse than the base model the gated model may be; differences are paired by "
        "prompt",
    )
    at: Literal["interval", "value"] = Field(
        "interval", description="interval: the unfavourable end of the 95 % interval has to meet the bound"
    )

    @model_validator(mode="after")
    def _one_bound(self) -> Condition:
        given = [name for name in BOUNDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expects exactly one of {', '.join(BOUNDS)}, got {len(given)}")
        return self

    @property
    def bound(self) -> tuple[Bound, float]:
        """Which of the three bounds the condition has, and its value."""
        return next((name, value) for name in BOUNDS if (value := getattr(self, name)) is not None)


class GateConfig(Section):
    """The conditions, all of which have to be met.

    An evaluation that is unfinished, invalid, of other weights than the model of the run has now, or not
    comparable with that of the base model meets none.
    """

    model: ModelName = Field("trained", description="the model that is gated")
    base: AlignedName = Field(
        "base", description="the model of `max_regression`; `trained` for a gate on `tampered`"
    )
    max_broken: Fraction = Field(
        0.1,
        description="share of broken answers that every benchmark of a condition may have, as measured: a "
        "model that babbles is safe and of no use",
    )
    conditions: list[Condition] = Field(min_length=1, description="all of them have to be met")

    @model_validator(mode="after")
    def _two_models(self) -> GateConfig:
        if self.model == self.base and any(c.max_regression is not None for c in self.conditions):
            raise ValueError(f"model and base are both {self.base}: no model is worse than itself")
        return self


def load_gate(file: str | Path) -> GateConfig:
    """Read a gate file.

    Raises:
        UserError: one line that names the file and the key, with the nearest known key.
    """
    values = read_yaml(Path(file))
    require_tree(values, str(file))
    try:
        return GateConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{file}: {explain(error, GateConfig)}") from None
