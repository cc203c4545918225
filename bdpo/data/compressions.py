"""Compressed files, decompressed while they are read: gzip, zstd, xz and bzip2.

A file may hold several compressed streams, one behind the other. Anything else behind one is an error, as a
cut stream is: the modules `bz2` and `lzma` of Python skip it without a word.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

_READ_BYTES = 64 * 1024


def _zstd(path: Path) -> IO[bytes]:
    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


def _streams(path: Path, new: Callable[[], Any], padding: bytes) -> Iterator[bytes]:
    """The content of all streams of a file; `padding` may stand behind each of them.

    Raises:
        OSError: something else stands there, or a stream is damaged.
        EOFError: the last stream is cut.
    """
    stream = new()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            while data:
                if stream.eof:
                    if not (data := data.lstrip(padding)):
                        break
                    stream = new()
                yield stream.decompress(data)
                data = stream.unused_data
    if not stream.eof:
        raise EOFError("the compressed data are cut")


class _Decompressed(io.RawIOBase):
    """The file that some chunks of bytes make."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = chunk
        taken, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)


def _opener(new: Callable[[], Any], padding: bytes = b"") -> Callable[[Path], IO[bytes]]:
    return lambda path: io.BufferedReader(_Decompressed(_streams(path, new, padding)), _READ_BYTES)


COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".zst": _zstd,
    ".xz": _opener(lzma.LZMADecompressor, padding=b"\0"),
    ".bz2": _opener(bz2.BZ2Decompressor),
}
"""Suffix -> what opens such a file for reading."""
