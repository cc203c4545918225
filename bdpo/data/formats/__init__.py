"""Preference file formats: one raw row -> the common pair. A format is one file here.

`bdpo.data.sources` reads the files, and `bdpo.data.checks` checks the texts of a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module
from math import isnan

from bdpo.data.formats.base import Format, Pair, ReadRow, Row
from bdpo.data.formats.columns import COMMON_COLUMNS, with_common_columns
from bdpo.errors import UserError

_NAMES = (
    "preference",
    "preference_text",
    "hh_rlhf",
    "pku_saferlhf",
    "sharegpt",
    "openai",
    "llama_factory_v1",
    "instruction",
    "ranked",
    "helpsteer",
    "chatml",
    "stringified",
)
"""Each is a module of this package."""

FORMATS: dict[str, Format] = {name: import_module(f"bdpo.data.formats.{name}").FORMAT for name in _NAMES}

KNOWN_COLUMNS = frozenset({*COMMON_COLUMNS, *(name for form in FORMATS.values() for name in form.columns)})


def columns_of(form: Format) -> frozenset[str]:
    """All columns that are looked at in a row of a format."""
    return frozenset({*form.columns, *COMMON_COLUMNS})


def read_pair(form: Format, row: Row) -> Pair:
    """The pair of a row, with the columns that every format has; a NaN, pandas' null, is a null.

    Columns of the format that hold something, of which it took nothing, are among the pair's `unread`.

    Raises:
        BadRow: the row cannot be used.
        Excluded: the format's rule leaves it out.
    """
    if any(isinstance(value, float) and isnan(value) for value in row.values()):
        row = {name: None if value != value else value for name, value in row.items()}
    given = ReadRow(row)
    pair = with_common_columns(form.read(given), row)
    untaken = given.untaken(form.columns)
    return replace(pair, unread=pair.unread | untaken) if untaken else pair


def format_named(name: str) -> Format:
    """The format that `data.format` names.

    Raises:
        UserError: there is none of that name.
    """
    if name not in FORMATS:
        near = get_close_matches(name, FORMATS, 1)
        hint = f"did you mean {near[0]}?" if near else f"it is one of auto, {', '.join(FORMATS)}"
        raise UserError(f"data.format={name}: unknown format; {hint}")
    return FORMATS[name]


def detect(rows: Sequence[Row], source: str, schema: Sequence[str] = ()) -> Format:
    """The one format that the columns of some sample rows fit; `source` is what an error names.

    `schema` are the names of all columns where the container declares them as such.

    Raises:
        UserError: they fit no format, or more than one.
    """
    fitting = [name for name, form in FORMATS.items() if any(form.fits(row) for row in rows)]
    if len(fitting) > 1:  # a bad row of any other format may look like this one
        fitting = [name for name in fitting if name != "preference_text"]
    if len(fitting) == 1:
        return FORMATS[fitting[0]]
    if fitting:
        raise UserError(f"{source}: columns fit the formats {' and '.join(sorted(fitting))}; set data.format")
    columns = ",".join(schema) or _known(rows)
    raise UserError(
        f"{source}: columns {columns} fit no known format; set data.columns, such as "
        f"{{prompt: question, chosen: good, rejected: bad}}, or data.format ({_nearest(rows)})"
    )


def _nearest(rows: Sequence[Row]) -> str:
    """What the formats expect that know one of the columns; without any, the names of all formats."""
    columns = {column for row in rows for column in row}
    near = [f"{name}: {form.expects}" for name, form in FORMATS.items() if columns & {*form.columns}]
    return "; ".join(near) or ", ".join(FORMATS)


def _known(rows: Sequence[Row]) -> str:
    """The columns that some format knows; another name may be a text, in a file without a header."""
    columns = {str(column) for row in rows for column in row}
    known = sorted(columns & KNOWN_COLUMNS)
    others = len(columns) - len(known)
    return ",".join(known + ([f"{others} unknown"] if others else [])) or "(none)"
