"""Whose fault an error of a trial is: its own, which it would meet again, or that of what it runs on."""

from __future__ import annotations

from collections.abc import Iterator

from ray.exceptions import OutOfMemoryError

from bdpo.errors import UserError, first_line
from bdpo.models.oom import out_of_memory

# How Ray's exceptions name the one that they wrap
_WRAPPED = ("cause", "controller_failure", "health_check_failure")


def own_fault(error: BaseException) -> BaseException | None:
    """What of `error` is the trial's own: not a number, no memory for it, or what its user is to mend."""
    return next((cause for cause in causes(error) if _is_own(cause)), None)


def causes(error: BaseException) -> Iterator[BaseException]:
    """What really failed, out of Ray's wrapping; of a group of workers what each of them raised."""
    wrapped = [getattr(error, name, None) for name in _WRAPPED]
    wrapped += getattr(error, "worker_failures", {}).values()
    inside = [each for each in wrapped if isinstance(each, BaseException)]
    if not inside:
        yield error
    for each in inside:
        yield from causes(each)


def in_a_line(error: BaseException) -> str:
    """Its first cause by class and message."""
    cause = next(causes(error))
    return f"{type(cause).__name__}: {first_line(cause)}"


def _is_own(error: BaseException) -> bool:
    return isinstance(error, (FloatingPointError, UserError, OutOfMemoryError)) or out_of_memory(error)
