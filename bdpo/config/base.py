"""What every section of the config is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

SANDBOX = "sandbox"


class Section(BaseModel):
    """Base of every section: immutable, strict about types and finite, unknown keys forbidden."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _one_or_range(workers: int | list[int]) -> int | list[int]:
    low, high = worker_range(workers)
    if not 1 <= low <= high:
        raise ValueError(f"wants n >= 1, or [min, max] with 1 <= min <= max, not {workers}")
    return workers


def worker_range(workers: int | list[int]) -> tuple[int, int]:
    """(min, max) of a pool that is configured as `n` or `[min, max]`."""
    if isinstance(workers, int):
        return workers, workers
    if len(workers) != 2:
        raise ValueError("wants a number, or a list of two: [min, max]")
    return workers[0], workers[1]


Workers = Annotated[int | list[int], AfterValidator(_one_or_range)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
