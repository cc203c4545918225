"""Where results lie: a local or mounted folder, or object storage (`s3://`, `gs://`, any URL of fsspec).

Everything else reads and writes through the paths that `storage_path` makes, pathlib's or their like
(`upath`), and never asks which; here is the little that differs. An object appears whole under its name
or not at all, so nothing is renamed there. A folder cannot appear at once: its marker is written last
and removed first. Credentials and endpoint come from the environment, as the protocol's library reads
them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ... for S3).
"""

from __future__ import annotations

import _thread
import errno
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self, TypeAlias
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem
from upath import UPath

from bdpo.errors import UserError

StoragePath: TypeAlias = Path | UPath

MARKERS = ("manifest.json", "config.json", "adapter_config.json")
"""The files that say that the folder they lie in is whole: the last to be uploaded, the first to go."""

BEAT_SECONDS = 5.0
LEASE_SECONDS = 30.0
"""So long a lock on object storage may be without a sign of life before another command takes it."""


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


def cache_folder() -> Path:
    """Where things that are made once on a machine are kept: `$BDPO_CACHE`, else `~/.cache/bdpo`."""
    return Path(os.environ.get("BDPO_CACHE") or Path.home() / ".cache" / "bdpo")


def error_line(error: Exception) -> str:
    """One line of a storage's error."""
    strerror = getattr(error, "strerror", None)
    return strerror or (str(error).strip() or type(error).__name__).splitlines()[0]


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
def whole_folder(to: StoragePath) -> Iterator[Path]:
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


def fetch(path: StoragePath) -> Path:
    """The local copy of a folder or file: itself, or its download into the machine's cache.

    A copy is kept under digests of its URL and of names, sizes and etags: a model is downloaded once a
    machine, and a changed one again, in place of the copy before.

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
            with whole_folder(copy) as folder:
                path.fs.get(list(names), [str(folder / name) for name in names.values()])
    return copy / path.name if path.path in found else copy


def forget(path: StoragePath) -> None:
    """Remove what `fetch` keeps of a folder or file on object storage; one of this machine is no copy."""
    if not isinstance(path, Path):
        discard(_copies(path))


def _copies(path: UPath) -> Path:
    """Where the copy of a URL is kept, in a folder that is called after its version."""
    return cache_folder() / "fetched" / _digest(str(path))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _version(info: dict[str, Any]) -> str:
    """What changes with the content of an object, in the words of its protocol."""
    return next(str(info[key]) for key in ("ETag", "etag", "mtime", "LastModified", "created") if key in info)


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


def matching(folder: StoragePath, pattern: str) -> list[StoragePath]:
    """What a glob pattern finds in a folder, in order; nothing in one that is not there."""
    return sorted(folder.glob(pattern), key=str)


def sha256(file: StoragePath) -> str:
    """SHA-256 of a file's content, which is never all in memory."""
    content: Any = file.open("rb")
    with content as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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


def lock(folder: StoragePath) -> FileLock | Lease:
    """Take a folder for this process alone, until the block ends or the process dies.

    Raises:
        Timeout: another process has it.
    """
    if not isinstance(folder, Path):
        return Lease(folder / ".lock")
    local = FileLock(folder / ".lock")
    local.acquire(timeout=0)
    return local


def lock_holder(folder: StoragePath) -> str:
    """The host and pid that a folder's lock names; nothing for a local one, which names none."""
    if isinstance(folder, Path):
        return ""
    try:
        found = json.loads(_get(folder / ".lock"))
        return f" (pid {found['pid']} on {found['host']})"
    except Exception:  # it has ended since, or the storage is away: no reason to say less of the rest
        return ""


def _get(file: UPath) -> bytes:
    """An object in one GET: an open file asks for its ETag first, which changes with every sign of life."""
    content: bytes = file.fs.cat_file(file.path)
    return content


class Lease:
    """A lock on object storage: an object that its holder writes anew every few seconds.

    It is created by a conditional PUT, which one of two processes wins. Whoever finds it watches it: if
    it changes, the holder lives; if it does not for `LEASE_SECONDS`, the holder is dead and its lock is
    taken. No clocks are compared. A holder that was cut off for so long finds another's lock and stops.
    """

    def __init__(self, file: UPath) -> None:
        self.file = file
        self.holder = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
        self.released = threading.Event()
        if not self._create():
            self._take_over()
        self.beating = threading.Thread(target=self._beat, daemon=True)
        self.beating.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Stop beating and remove the object, if it is still this one's."""
        self.released.set()
        self.beating.join()
        if self._is_mine():
            self.file.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            self.file.fs.pipe_file(self.file.path, self._content(), mode="create")
        except FileExistsError:
            return False
        return True

    def _take_over(self) -> None:
        found = self._read()
        print(
            f"{self.file}: is there; seeing for {LEASE_SECONDS:g} s whether its command lives",
            file=sys.stderr,
        )
        end = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < end:
            time.sleep(BEAT_SECONDS / 2)
            now = self._read()
            if now is None and self._create():
                return
            if now != found:
                raise Timeout(str(self.file))
        write_bytes(self.file, self._content())
        time.sleep(BEAT_SECONDS)  # of two that take it at once the last writer has it
        if not self._is_mine():
            raise Timeout(str(self.file))

    def _beat(self) -> None:
        while not self.released.wait(BEAT_SECONDS):
            try:
                if not self._is_mine():
                    print(f"{self.file}: was taken by another command", file=sys.stderr)
                    return _thread.interrupt_main()
                write_bytes(self.file, self._content())
            except Exception:  # noqa: S112 (storage that is away for a moment; whoever watches has more patience)
                continue

    def _content(self) -> bytes:
        return json.dumps({**self.holder, "beat": uuid.uuid4().hex}).encode()

    def _read(self) -> dict[str, Any] | None:
        try:
            content: dict[str, Any] = json.loads(_get(self.file))
        except FileNotFoundError:
            return None
        return content

    def _is_mine(self) -> bool:
        found = self._read()
        return found is not None and found["token"] == self.holder["token"]
