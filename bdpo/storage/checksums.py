"""SHA-256 digests of a folder's files, in a file beside them: an exported model is read as it was exported.

The file is written by `write_checksums` when the folder is complete, and compared by `require_checksums`
whenever the folder is read. A folder of another origin has no such file and nothing to be compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bdpo.errors import UserError
from bdpo.storage.digests import cached_sha256, sha256
from bdpo.storage.paths import StoragePath, write_text
from bdpo.storage.sealed import sealed, unsealed

CHECKSUMS = "checksums.json"
"""The file with the digests, a sealed JSON object."""


def write_checksums(folder: Path) -> None:
    """Record every file of a local folder; each is read once, in blocks."""
    files = {file.relative_to(folder).as_posix(): sha256(file) for file in _files(folder)}
    write_text(folder / CHECKSUMS, sealed({"sha256": files}, indent=2, sort_keys=True) + "\n")


def require_checksums(folder: Path) -> None:
    """Make sure that the files of a local folder are those that were recorded, if a record is there.

    A file is read once on a machine, for as long as it is the same file.

    Raises:
        UserError: a file was changed, removed or added, or the record is damaged; the file is named.
    """
    recorded = recorded_checksums(folder)
    if recorded is None:
        return
    there = {file.relative_to(folder).as_posix(): file for file in _files(folder)}
    for name in sorted({*recorded, *there}):
        if name not in there or cached_sha256(there[name]) != recorded.get(name):
            raise _changed(folder / name)


def recorded_checksums(folder: StoragePath) -> Mapping[str, str] | None:
    """File name -> SHA-256, as recorded; None if a folder has no record.

    Raises:
        UserError: the record is damaged.
    """
    try:
        recorded: Mapping[str, str] = unsealed((folder / CHECKSUMS).read_bytes())["sha256"]
        return recorded
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError):
        raise _changed(folder / CHECKSUMS) from None


def _files(folder: Path) -> list[Path]:
    """The files of a folder, without the record and without hidden ones (of file browsers and the like)."""
    files = (file for file in folder.rglob("[!.]*") if file.is_file())
    return sorted(file for file in files if file != folder / CHECKSUMS)


def _changed(file: StoragePath) -> UserError:
    return UserError(
        f"{file}: not as it was exported (changed, removed or added); remove the folder, and the training "
        f"exports it again from its last checkpoint, or remove {CHECKSUMS} if the change is meant"
    )
