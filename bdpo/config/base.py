"""Types that several sections of the config share."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import AfterValidator, Field

from bdpo.section import RUNTIME_ONLY

SANDBOX = "sandbox"

Value = TypeVar("Value")


def _one_or_range(workers: int | list[int]) -> int | list[int]:
    low, high = worker_range(workers)
    if not 1 <= low <= high:
        raise ValueError(f"expects n >= 1, or [min, max] with 1 <= min <= max, not {workers}")
    return workers


def worker_range(workers: int | list[int]) -> tuple[int, int]:
    """(min, max) of a pool that is configured as `n` or `[min, max]`."""
    if isinstance(workers, int):
        return workers, workers
    if len(workers) != 2:
        raise ValueError("expects a number, or a list of two: [min, max]")
    return workers[0], workers[1]


def workers_label(workers: int | list[int]) -> str:
    """`n`, or "min to max" where these differ."""
    low, high = worker_range(workers)
    return f"{low} to {high}" if low < high else f"{low}"


Workers = Annotated[int | list[int], AfterValidator(_one_or_range)]


def _distinct(values: list[Value]) -> list[Value]:
    """What is asked twice would count as twice the evidence."""
    if len(set(values)) < len(values):
        raise ValueError("names something twice")
    return values


Distinct = AfterValidator(_distinct)

StallSeconds = Annotated[
    float,
    Field(
        gt=0,
        description="a worker is replaced if its work takes longer than this and 3 times the slowest so far",
    ),
    RUNTIME_ONLY,
]
"""The least limit of a piece of work: a shard, a training step, a checkpoint."""
