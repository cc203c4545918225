"""A file of rows as bytes and text: decompressed, in UTF-8 or what its byte order mark names."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bdpo.data.compressions import COMPRESSIONS
from bdpo.errors import UserError

# The longer of two that begin alike comes first.
_ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class DataFile:
    """A file of rows; `name` is what errors call it, `columns` are those that are read of declared ones."""

    path: Path
    name: str
    columns: frozenset[str]

    def open(self) -> IO[bytes]:
        """The content, decompressed."""
        opener = COMPRESSIONS.get(self.path.suffix.lower())
        return opener(self.path) if opener else self.path.open("rb")

    def lines(self) -> Iterator[bytes]:
        """The lines in UTF-8 without a byte order mark, whatever encoding the file's own mark names.

        Raises:
            UserError: a file in UTF-16 or UTF-32 is not in that encoding.
        """
        with self.open() as file:
            encoding = encoding_of(file.read(4))
        with self.open() as file:
            if encoding in ("utf-8", "utf-8-sig"):
                first = file.readline()
                yield first.removeprefix(codecs.BOM_UTF8)
                yield from file
                return
            try:
                for line in io.TextIOWrapper(file, encoding, newline="\n"):
                    yield line.encode(errors="surrogatepass")
            except UnicodeError:
                raise UserError(
                    f"{self.name}: not {encoding.upper()}, which its byte order mark names"
                ) from None

    def text(self) -> str:
        """The complete content as text, in UTF-8 or the encoding of its byte order mark.

        Raises:
            UserError: it is not in that encoding.
        """
        with self.open() as file:
            data = file.read()
        encoding = encoding_of(data[:4])
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            name = encoding.upper().removesuffix("-SIG")
            raise UserError(f"{self.name}: not {name} at byte {error.start} (line {line})") from None


def encoding_of(start: bytes) -> str:
    """The encoding that a file's byte order mark names, UTF-8 without one."""
    return next((encoding for mark, encoding in _ENCODINGS if start.startswith(mark)), "utf-8")
