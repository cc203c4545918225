"""A benchmark's file by path, or from the network by its content: what is not pinned is not fetched."""

from __future__ import annotations

import hashlib
from pathlib import Path

from bdpo.errors import UserError, first_line
from bdpo.storage.cache import cache_folder, machine_lock
from bdpo.storage.limits import storage_options
from bdpo.storage.paths import write_bytes


def pinned_file(path: str, sha256: str | None) -> Path:
    """The local file of `path`: itself, or its download if it is a URL that fsspec can open.

    `hf://datasets/<owner>/<name>@<revision>/<file>` is a file of the hub. A download is kept in the cache
    under its digest, so a second run needs no network.

    Raises:
        UserError: a URL comes without its sha256, cannot be read, or the content has another digest.
    """
    if "://" not in path:
        if sha256 is not None and Path(path).is_file():
            _check(path, Path(path).read_bytes(), sha256)
        return Path(path)
    if sha256 is None:
        raise UserError(f"{path}: a URL expects the sha256 of its content, so that the prompts stay the same")
    cached = cache_folder() / "benchmarks" / f"{sha256}.csv"
    with machine_lock(cached.with_name(f"{cached.name}.lock")):
        if not cached.exists():
            content = _download(path)
            _check(path, content, sha256)
            write_bytes(cached, content)
    return cached


def _download(url: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(url, "rb", **storage_options(url.partition("://")[0])) as stream:
            return bytes(stream.read())
    except Exception as error:  # every protocol of fsspec has errors of its own
        raise UserError(f"{url}: cannot be read ({type(error).__name__}: {first_line(error)})") from None


def _check(path: str, content: bytes, sha256: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(f"{path}: has sha256 {found}, expects {sha256}")
