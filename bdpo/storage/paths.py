"""Where results lie: a local or mounted folder, or object storage (`s3://`, `gs://`, any URL of fsspec).

Everything else reads and writes through the paths that `storage_path` makes, pathlib's or their like
(`upath`), and never asks which; here is the little that differs. An object appears whole under its name
or not at all, so nothing is renamed there. A folder cannot appear at once: its marker is written last
and removed first. Credentials and endpoint come from the environment, as the protocol's library reads
them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ... for S3).
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem
from upath import UPath

from bdpo.errors import UserError, error_line

StoragePath: TypeAlias = Path | UPath

MARKERS = ("manifest.json", "config.json", "adapter_config.json")
"""The files that say that the folder they lie in is whole: the last to be uploaded, the first to go."""


def storage_path(name: str | StoragePath, key: str) -> StoragePath:
    """The path of a folder or URL; `key` is what an error names.

    Raises:
        UserError: the URL's protocol is unknown or wants a package, or there is a password in it, or a
            character that fsspec would take for a pattern: files below it would not be found.
    """
    if isinstance(name, UPath) and not isinstance(name, Path):
        return name
    protocol, separator, rest = str(name).partition("://")
    if not separator or protocol == "file":
        return Path(rest if separator else name).expanduser().resolve()
    if urlsplit(str(name)).password is not None:
        raise UserError(f"{key}: no credentials in a URL, they come from the environment")
    if protocol not in ("http", "https") and set(rest) & set("[]*?"):  # a web page's address may have a query
        raise UserError(f"{key}={name}: the characters [ ] * ? stand for patterns there; use another name")
    try:
        # Other processes write here too: a listing must not be remembered.
        path = UPath(str(name).rstrip("/"), use_listings_cache=False)
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise UserError(f"{key}={name}: {error_line(error)}") from None
    return path


def read_text(file: StoragePath) -> str:
    """A whole text file as it is at one moment, see `read_bytes`."""
    return read_bytes(file).decode("utf-8")


def read_bytes(file: StoragePath) -> bytes:
    """A whole file; on object storage in one request, as another process may replace it between two."""
    return file.read_bytes() if isinstance(file, Path) else bytes(file.fs.cat_file(file.path))


def write_text(file: StoragePath, text: str, mode: int = 0o644) -> None:
    """Write a whole text file or none."""
    write_bytes(file, text.encode(), mode)


def write_bytes(file: StoragePath, content: bytes | pa.Buffer, mode: int = 0o644) -> None:
    """Write a whole file or none: temporary name, fsync, rename, fsync; on object storage one PUT.

    A folder that is made for a private file (mode 0600) is private too. Modes are of local files alone.
    """
    if not isinstance(file, Path):
        file.fs.pipe_file(file.path, bytes(content))
        return
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700 if mode == 0o600 else 0o777)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")  # pids are of one host, a mount of many
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk wants its space back
    _fsync_names(file.parent)


def _fsync_names(folder: Path) -> None:
    """Make a rename in a local folder last through a loss of power, where its file system can."""
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
    """A local folder to fill; it takes the place of `to` when the block ends well.

    A local folder is renamed. Another is uploaded from the machine's scratch, its marker last: until then
    it has none.
    """
    if not isinstance(to, Path):
        with tempfile.TemporaryDirectory(prefix="bdpo-") as scratch:
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


def upload(folder: Path, to: UPath) -> None:
    """Copy the files of a local folder to object storage, the markers last."""
    files = sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.name)
    last = [file for file in files if file.name in MARKERS]
    for batch in ([file for file in files if file not in last], last):
        to.fs.put(
            [str(file) for file in batch], [(to / file.relative_to(folder).as_posix()).path for file in batch]
        )


def discard(*paths: StoragePath) -> None:
    """Remove files and folders, of a folder the markers first; what is not there is no error."""
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
    """What a glob pattern finds in a folder, in order; nothing in one that is not there."""
    return sorted(folder.glob(pattern), key=str)


def parquet_bytes(table: pa.Table) -> pa.Buffer:
    """The content of a Parquet file."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def write_parquet(file: StoragePath, table: pa.Table) -> None:
    """Write a whole Parquet file or none."""
    write_bytes(file, parquet_bytes(table))


def open_parquet(file: StoragePath) -> Any:
    """The source of a Parquet file for pyarrow: an open file that reads no more than it is asked for."""
    return file if isinstance(file, Path) else file.fs.open(file.path, "rb", cache_type="none")


def arrow_filesystem(path: StoragePath) -> tuple[FileSystem, str]:
    """The filesystem of a path as pyarrow and Ray Train know it, and the path in it."""
    if isinstance(path, Path):
        return LocalFileSystem(), str(path)
    return PyFileSystem(FSSpecHandler(path.fs)), path.path
