"""Reading and writing results: in a local or mounted folder, or on object storage (any URL of fsspec).

All other code uses the paths that `storage_path` makes, of pathlib or of `upath`, without a distinction; the
few operations that differ are in this module. An object appears complete under its name or not at all, so
nothing is renamed there. A folder on object storage cannot appear at once: its marker is written last and
removed first. Credentials and endpoint come from the environment, as the protocol's library reads them
(AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ... for S3); how long a request may take, see `bdpo.storage.limits`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from inspect import signature
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem
from upath import UPath

from bdpo.errors import UserError, error_line
from bdpo.storage.limits import AT_ONCE, storage_options

StoragePath: TypeAlias = Path | UPath

Found = TypeVar("Found")

_GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""What a file begins with that Git has not fetched from its large file storage."""

MARKERS = ("manifest.json", "config.json", "adapter_config.json")
"""Files that mark their folder as complete: uploaded last, removed first."""


def local_path(name: str) -> Path:
    """A path of this machine; `~` is the home folder, while the `~name` of no user stays a name."""
    return Path(os.path.expanduser(name))


def require_fetched(file: Path, name: str | None = None) -> None:
    """Make sure that a file is not the pointer to it that Git leaves where LFS is not installed.

    Raises:
        UserError: it is; the file is named, by `name` where it has another one.
    """
    with suppress(OSError), file.open("rb") as opened:  # of one that cannot be read its reader complains
        if opened.read(len(_GIT_LFS_POINTER)) == _GIT_LFS_POINTER:
            raise UserError(
                f"{name or file}: a Git LFS pointer instead of the file; fetch it with `git lfs pull`"
            )


def storage_path(name: str | StoragePath, key: str) -> StoragePath:
    """The path of a folder or URL; errors name the config key `key`.

    Raises:
        UserError: the name is empty; no user has the name of `~name`; the URL's protocol is unknown or
            requires a package; the URL contains a password, or a character that fsspec would take for a
            pattern, so that it would not find files below it.
    """
    if isinstance(name, UPath) and not isinstance(name, Path):
        return name
    if not str(name).strip():
        raise UserError(f"{key}: is empty")
    protocol, separator, rest = str(name).partition("://")
    if not separator or protocol == "file":
        local = local_path(rest if separator else str(name))
        if str(local).startswith("~"):
            raise UserError(f"{key}={name}: no user of this machine has this name")
        return local.resolve()
    if urlsplit(str(name)).password is not None:
        raise UserError(f"{key}: no credentials in a URL, they come from the environment")
    if protocol not in ("http", "https") and set(rest) & set("[]*?"):  # a web page's address may have a query
        raise UserError(f"{key}={name}: on object storage the characters [ ] * ? are patterns; rename it")
    try:
        path = UPath(str(name).rstrip("/"), **storage_options(protocol))
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise UserError(f"{key}={name}: {error_line(error)}") from None
    return path


def read_text(file: StoragePath) -> str:
    """The text of a file at one moment, see `read_bytes`."""
    return read_bytes(file).decode("utf-8")


def read_bytes(file: StoragePath) -> bytes:
    """The content of a file; on object storage in one request, as it may be replaced between two."""
    return file.read_bytes() if isinstance(file, Path) else bytes(file.fs.cat_file(file.path))


def update(file: StoragePath, content: bytes) -> None:
    """Write a file as `write_bytes` does, unless it has this content: a repeated command leaves it alone."""
    if not (file.is_file() and read_bytes(file) == content):
        write_bytes(file, content)


def write_text(file: StoragePath, text: str, mode: int = 0o644) -> None:
    """Write a text file, complete or not at all; see `write_bytes`."""
    write_bytes(file, text.encode(), mode)


def write_bytes(file: StoragePath, content: bytes | pa.Buffer, mode: int = 0o644) -> None:
    """Write a file, complete or not at all: temporary name, fsync, rename, fsync; on object storage one PUT.

    A folder that is created for a private file (mode 0600) is private too. Modes apply to local files only.
    A killed process leaves its temporary file behind, see `remove_temporary_files`.
    """
    if not isinstance(file, Path):
        file.fs.pipe_file(file.path, bytes(content))
        return
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700 if mode == 0o600 else 0o777)
    # A pid would not be unique: several hosts may write to the same mount.
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)  # after an error: on a full disk its space is needed
    _fsync_names(file.parent)


def _fsync_names(folder: Path) -> None:
    """Make a rename in a local folder survive a power failure, if its file system supports that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def private_file(file: StoragePath) -> Iterator[IO[str]]:
    """Write a text file of mode 0600 in a folder of mode 0700, line by line; an earlier one is replaced."""
    if not isinstance(file, Path):
        with file.open("w", encoding="utf-8") as stream:
            yield stream
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.parent.chmod(0o700)
    file.unlink(missing_ok=True)
    with open(file, "w", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
        yield stream


@contextmanager
def atomic_folder(to: StoragePath) -> Iterator[Path]:
    """A local folder to fill, which replaces the folder `to` when the block ends without an exception.

    If `to` is local the folder is renamed. Else it is filled in the machine's temporary folder and uploaded,
    its marker last: until then `to` has no marker. What a killed process left behind is removed first.
    """
    if not isinstance(to, Path):
        prefix = f"bdpo-upload-{hashlib.sha256(str(to).encode()).hexdigest()[:16]}-"
        for leftover in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=prefix) as scratch:
            yield Path(scratch)
            discard(to)
            upload(Path(scratch), to)
        return
    unfinished = to.with_name(f".{to.name}.unfinished")
    discard(unfinished)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        discard(to)
        unfinished.rename(to)
    finally:
        discard(unfinished)


_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")


def remove_temporary_files(folder: StoragePath) -> None:
    """Remove the temporary files that killed commands left in a local folder and all folders below it.

    Only the command that holds the lock of the folder may call this, before it writes anything.
    """
    if isinstance(folder, Path):
        for file in folder.rglob(".*"):
            if _TEMPORARY.fullmatch(file.name) and file.is_file():
                file.unlink(missing_ok=True)


def upload(folder: Path, to: UPath) -> None:
    """Copy the files of a local folder to object storage, the markers last."""
    files = sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.name)
    last = [file for file in files if file.name in MARKERS]
    for batch in ([file for file in files if file not in last], last):
        to.fs.put(
            [str(file) for file in batch], [(to / file.relative_to(folder).as_posix()).path for file in batch]
        )


def discard(*paths: StoragePath) -> None:
    """Remove files and folders, the markers of a folder first; a missing one is no error."""
    for path in paths:
        if path.is_dir():
            for marker in MARKERS:
                (path / marker).unlink(missing_ok=True)
            if isinstance(path, Path):
                shutil.rmtree(path)
            elif path.is_dir():  # object storage has no empty folders
                path.fs.rm(path.path, recursive=True)
        else:
            path.unlink(missing_ok=True)


def sorted_glob(folder: StoragePath, pattern: str) -> list[StoragePath]:
    """The files in a folder that match a glob pattern, in order; none if the folder does not exist."""
    if isinstance(folder, Path) or "/" in pattern:
        return sorted(folder.glob(pattern), key=str)
    try:  # one request: fsspec's own glob also looks for the folder and for folders in it
        names = [name.rstrip("/").rpartition("/")[2] for name in folder.fs.ls(folder.path, detail=False)]
    except FileNotFoundError:
        return []
    return sorted((folder / name for name in names if fnmatch(name, pattern)), key=str)


def sorted_from(folder: StoragePath, prefix: str) -> list[StoragePath]:
    """The files whose names begin with `prefix` in a folder without folders, in order.

    Object storage lists these alone: a listing of the folder takes a request for each thousand of its files.
    """
    if isinstance(folder, Path) or "prefix" not in signature(_find(folder.fs)).parameters:
        return sorted_glob(folder, f"{prefix}*")
    names = folder.fs.find(folder.path, prefix=prefix)
    return sorted((folder / name.rpartition("/")[2] for name in names), key=str)


def _find(filesystem: Any) -> Callable[..., Any]:
    """What lists all files of a filesystem: the coroutine, if there is one, since it alone has parameters."""
    found: Callable[..., Any] = getattr(filesystem, "_find", filesystem.find)
    return found


def at_once(work: Callable[[StoragePath], Found], files: Sequence[StoragePath]) -> Iterator[Found]:
    """`work` of each file, in order: on object storage of several at a time, since each waits for answers."""
    if all(isinstance(file, Path) for file in files):
        yield from map(work, files)
        return
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for start in range(0, len(files), AT_ONCE):
            yield from pool.map(work, files[start : start + AT_ONCE])


def parquet_bytes(table: pa.Table) -> pa.Buffer:
    """The content of a Parquet file."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    return buffer.getvalue()


_DIGEST_KEY = b"bdpo.digest"


def write_parquet(file: StoragePath, table: pa.Table) -> None:
    """Write a Parquet file with a digest of its rows in its metadata, complete or not at all."""
    table = table.replace_schema_metadata(None)
    write_bytes(file, parquet_bytes(table.replace_schema_metadata({_DIGEST_KEY: _rows_digest(table)})))


def read_parquet(file: StoragePath) -> pa.Table:
    """The rows that `write_parquet` wrote.

    Raises:
        UserError: the file is damaged, or was not written by `write_parquet`.
        FileNotFoundError: there is no such file.
    """
    content = read_bytes(file)
    try:
        table = pq.read_table(pa.BufferReader(content))
        digest, table = (table.schema.metadata or {}).get(_DIGEST_KEY), table.replace_schema_metadata(None)
        intact = digest == _rows_digest(table)
    except (pa.ArrowException, OSError, ValueError):
        intact = False
    if not intact:
        raise UserError(
            f"{file}: damaged, or not written by this version of bdpo; remove it, and the same command that "
            "made it makes it again"
        )
    return table


def _rows_digest(table: pa.Table) -> bytes:
    """A digest of the values alone: their layout in Arrow and Parquet changes with versions."""
    values = json.dumps(table.to_pydict(), default=str)
    return hashlib.sha256(values.encode()).hexdigest().encode()


def open_parquet(file: StoragePath) -> Any:
    """A Parquet file for pyarrow: on object storage an open file that reads only what is requested."""
    return file if isinstance(file, Path) else file.fs.open(file.path, "rb", cache_type="none")


def arrow_filesystem(path: StoragePath) -> tuple[FileSystem, str]:
    """The filesystem of a path for pyarrow and Ray Train, and the path in it."""
    if isinstance(path, Path):
        return LocalFileSystem(), str(path)
    return PyFileSystem(FSSpecHandler(path.fs)), path.path
