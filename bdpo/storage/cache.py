"""The machine's cache folder, and local copies of folders and files on object storage."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock
from upath import UPath

from bdpo.errors import UserError, error_line
from bdpo.storage.paths import StoragePath, atomic_folder, discard, storage_path


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
    """The folder for what is made once on a machine: `$BDPO_CACHE`, else `~/.cache/bdpo`."""
    return Path(os.environ.get("BDPO_CACHE") or Path.home() / ".cache" / "bdpo")


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
    copies.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{copies}.lock"):
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
