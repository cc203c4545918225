"""The machine's cache folder, and local copies of folders and files on object storage."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from upath import UPath

from bdpo.errors import UserError, error_line
from bdpo.storage.paths import StoragePath, atomic_folder, discard, storage_path

LOCK_SECONDS = 3600.0
"""How long a process waits for another one of its machine that makes or downloads the same."""


@contextmanager
def machine_lock(file: Path) -> Iterator[None]:
    """One process of this machine at a time; the kernel releases the lock of a process that has ended.

    The folder of the lock's file is made.

    Raises:
        UserError: another process has held the lock for `LOCK_SECONDS`: it stands still; or the folder
            cannot be made, or be written.
    """
    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise UserError(
            f"{file}: another process has held this lock for {LOCK_SECONDS / 60:.0f} minutes; end that "
            "process (`fuser -v FILE` lists it), and the same command resumes"
        ) from None
    except OSError as error:
        raise UserError(f"BDPO_CACHE: {file.parent} cannot be written ({error_line(error)})") from None
    try:
        yield
    finally:
        lock.release()


def cached_copy(url: str, key: str) -> Path:
    """The cached copy of a folder or file on object storage; errors name the config key `key`.

    Raises:
        UserError: there is no such folder or file, or it cannot be read.
    """
    try:
        return local_copy(storage_path(url, key))
    except UserError:
        raise
    except Exception as error:  # every protocol of fsspec has errors of its own
        raise UserError(f"{key}={url}: cannot be read ({error_line(error)})") from None


def cache_folder() -> Path:
    """The folder for what is made once on a machine: `$BDPO_CACHE`, else `~/.cache/bdpo`.

    Raises:
        UserError: the first is not set, and the user has no home.
    """
    try:
        return Path(os.environ.get("BDPO_CACHE") or Path.home() / ".cache" / "bdpo")
    except RuntimeError:  # a container may run as a user that it does not know
        raise UserError("BDPO_CACHE: is not set, and the user has no home folder; set it") from None


def local_copy(path: StoragePath) -> Path:
    """A folder or file as a local path: itself, or its download into the machine's cache.

    A copy is named by digests of its URL and of its files' names, sizes and etags. So a model is downloaded
    once per machine, and again when it changes; the new copy replaces the old one.

    Raises:
        FileNotFoundError: there is no such folder or file.
    """
    if isinstance(path, Path):
        return path
    if path.fs.isfile(path.path):
        parent, found = path.parent.path, {path.path: path.fs.info(path.path)}
    else:
        parent, found = path.path, path.fs.find(path.path, detail=True)
    if not found:
        raise FileNotFoundError(f"{path}: no such folder or file")
    names = {name: name.removeprefix(parent).lstrip("/") for name in found}
    versions = sorted((names[name], info["size"], _version(info)) for name, info in found.items())
    copies = _copies(path)
    copy = copies / _digest(json.dumps(versions))
    with machine_lock(copies.with_name(f"{copies.name}.lock")):
        copies.mkdir(exist_ok=True)
        if not copy.is_dir():
            discard(*copies.iterdir())
            with atomic_folder(copy) as folder:
                path.fs.get(list(names), [str(folder / name) for name in names.values()])
    return copy / path.name if path.path in found else copy


def drop_local_copy(path: StoragePath) -> None:
    """Remove the cached copy that `local_copy` made of something on object storage; local paths stay."""
    if not isinstance(path, Path):
        discard(_copies(path))


def _copies(path: UPath) -> Path:
    """The folder of the copies of a URL, each in a folder named after its version."""
    return cache_folder() / "fetched" / _digest(str(path))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _version(info: dict[str, Any]) -> str:
    """A property of an object that changes with its content; each protocol has another name for it."""
    return next(str(info[key]) for key in ("ETag", "etag", "mtime", "LastModified", "created") if key in info)
