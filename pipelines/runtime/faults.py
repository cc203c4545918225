"""Whether an error is the fault of the variant itself, which would meet it again, or of what it runs on."""

from __future__ import annotations

from collections.abc import Iterator

from ray.exceptions import OutOfMemoryError

from bdpo.errors import UserError, first_line
from bdpo.models.oom import out_of_memory

# The attributes in which Ray's exceptions keep the error that they wrap
_WRAPPED = ("cause", "controller_failure", "health_check_failure")


def own_fault(error: BaseException) -> BaseException | None:
    """The part of `error` that is the fault of the variant itself; None if there is none.

    Its own are a value that is not finite, too little memory, and a UserError. All other errors come from
    processes, nodes, storage or endpoints: a retry may succeed.
    """
    return next((cause for cause in causes(error) if _is_own(cause)), None)


def causes(error: BaseException) -> Iterator[BaseException]:
    """The errors that Ray's exceptions wrap; of a group of workers the error of each."""
    wrapped = [getattr(error, name, None) for name in _WRAPPED]
    wrapped += getattr(error, "worker_failures", {}).values()
    inside = [each for each in wrapped if isinstance(each, BaseException)]
    if not inside:
        yield error
    for each in inside:
        yield from causes(each)


def in_a_line(error: BaseException) -> str:
    """The first cause of an error, as its class and the first line of its message."""
    cause = next(causes(error))
    return f"{type(cause).__name__}: {first_line(cause)}"


def _is_own(error: BaseException) -> bool:
    return isinstance(error, (FloatingPointError, UserError, OutOfMemoryError)) or out_of_memory(error)
