"""The two kinds of failure of a run, each an exception of its own.

A `UserError` is something the user can fix: wrong config, input or environment. The command line
prints it as one line and exits with 2, as it does with a `StorageUnavailable` and with a cluster that has no
room for the run (`pipelines.runtime.stalls.NoRoom`). Everything else is a failure of the run: exit code 1.
"""

from __future__ import annotations


class UserError(Exception):
    """Wrong config, input or environment; its message is one line that names file, row, column or key."""


class StorageUnavailable(OSError):
    """Object storage gave no answer within the limit; its message is one line. A later try may succeed."""


def first_line(error: BaseException) -> str:
    """The first line of a library's error, with the next where it ends in a colon: enough for one of ours."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return escaped(f"{first} {others[0].strip()}" if first.endswith(":") and others else first)


def escaped(text: str) -> str:
    """The text with control characters and lone surrogates escaped: safe to show on a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def error_line(error: Exception) -> str:
    """One line of a storage's error."""
    strerror = getattr(error, "strerror", None)
    return strerror or first_line(error)
