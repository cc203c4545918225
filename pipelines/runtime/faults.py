"""Whether an error is the fault of the variant itself, which would meet it again, or of what it runs on."""

from __future__ import annotations

from ray.exceptions import OutOfMemoryError

from bdpo.errors import UserError, first_line
from bdpo.models.oom import out_of_memory
from pipelines.runtime.ray_internals import causes


def own_fault(error: BaseException) -> BaseException | None:
    """The part of `error` that is the fault of the variant itself; None if there is none.

    Its own are a value that is not finite, too little memory, and a UserError. All other errors come from
    processes, nodes, storage or endpoints: a retry may succeed.
    """
    return next((cause for cause in causes(error) if _is_own(cause)), None)


def in_a_line(error: BaseException) -> str:
    """The first cause of an error, as its class and the first line of its message."""
    cause = next(causes(error))
    return f"{type(cause).__name__}: {first_line(cause)}"


def _is_own(error: BaseException) -> bool:
    return isinstance(error, (FloatingPointError, UserError, OutOfMemoryError)) or out_of_memory(error)
