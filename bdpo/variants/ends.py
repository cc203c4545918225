"""How a variant ends, and the record of one that has no result: one vocabulary for arms and trials."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from bdpo.errors import UserError
from bdpo.storage.manifests import Fingerprint, read_manifest, write_manifest
from bdpo.storage.paths import StoragePath, discard

_FILE = "failed.json"


class End(StrEnum):
    """How far a variant is: open, or one of the five ways in which it ends."""

    OPEN = "open"
    """The variant is not begun, or not at its end."""
    COMPLETED = "completed"
    """Trained to its last step and evaluated."""
    STOPPED = "stopped"
    """Stopped early, because others did better after as many steps."""
    FAILED = "failed"
    """Ended by a fault of its own: a loss that is not finite, too little memory, values that do not fit."""
    INVALID = "invalid"
    """Trained, but too many of its answers have no verdict; the same command asks for the missing ones."""
    LOST = "lost"
    """Its process, its node or its storage failed more often than a variant is retried; the same command
    resumes it."""


class Cause(StrEnum):
    """What made a variant end without a result, as far as that decides what is done about it."""

    NOT_FINITE = "not finite"
    """A number of the training that is not finite: it would take as many hours to get there again."""
    USER = "user"
    """A UserError: its message names what the user can correct."""
    OTHER = "other"
    """Memory, a process, a node, the storage, verdicts that are missing."""

    @classmethod
    def of(cls, error: BaseException) -> Cause:
        """The cause that an error is."""
        if isinstance(error, FloatingPointError):
            return cls.NOT_FINITE
        return cls.USER if isinstance(error, UserError) else cls.OTHER


@dataclass(frozen=True)
class Failure:
    """Why a variant has no result."""

    end: End
    """FAILED, INVALID or LOST."""
    error: str
    """One line without text of the data: the class of the error and its message."""
    cause: Cause = Cause.OTHER

    @property
    def retried(self) -> bool:
        """Whether the same command tries the variant again: it may end in another way."""
        return self.cause != Cause.NOT_FINITE


def write_failure(folder: StoragePath, fingerprint: Fingerprint, failure: Failure) -> None:
    """Record in the folder of a variant why it has no result."""
    write_manifest(folder / _FILE, fingerprint, kind=failure.end, error=failure.error, cause=failure.cause)


def read_failure(folder: StoragePath, fingerprint: Fingerprint | None = None) -> Failure | None:
    """The failure that is recorded in the folder of a variant; None if it is of another fingerprint."""
    record = read_manifest(folder / _FILE)
    if record is None or fingerprint not in (None, record.fingerprint):
        return None
    return Failure(End(record["kind"]), record["error"], Cause(record.get("cause", Cause.OTHER)))


def forget_failure(folder: StoragePath) -> None:
    """Remove the record: the variant is open again."""
    discard(folder / _FILE)
