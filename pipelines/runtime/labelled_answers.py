"""Labelled answers from files: rows of any kind, and artifacts of jailbreaks, which have a verdict each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bdpo.data.containers import Unreadable, kind_of, read_file, shown_name
from bdpo.data.data_file import DataFile
from bdpo.errors import UserError
from bdpo.evaluation.benchmarks.jailbreak import Artifact, is_artifact
from bdpo.evaluation.calibration.labels import (
    LabelClass,
    LabelledAnswer,
    LabelScheme,
    label_scheme,
    label_text,
)
from bdpo.storage import strict_json

Pattern = tuple[str, str]
"""(column, pattern of the shell)"""


@dataclass(frozen=True)
class LabelledFiles:
    """Which answers are read, and what of them."""

    files: tuple[str, ...]
    prompt: str
    answer: str
    label: str
    model: str | None = None
    only: Pattern | None = None
    """Rows whose cell does not match are left out."""
    true: LabelClass | None = None
    parts: tuple[Pattern, ...] = ()
    """Each divides the answers in two: those of rows whose cell matches, and the others."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read."""
        patterns = [column for column, _ in (*filter(None, [self.only]), *self.parts)]
        named = (self.prompt, self.answer, self.label, self.model, *patterns)
        return tuple(name for name in named if name)


@dataclass(frozen=True)
class _Row:
    where: str
    model: str
    cells: dict[str, Any]


def read_answers(request: LabelledFiles) -> tuple[LabelScheme, list[LabelledAnswer], Counter[str]]:
    """What labels mean, the labelled answers, and how many rows were left out for which reason.

    Raises:
        UserError: naming file, row and column: it cannot be read, lacks a column, or has an unknown label; or
            naming two files that are one, or whose models would have one name.
    """
    rows: list[_Row] = []
    left_out: Counter[str] = Counter()
    for file, model, found in _files(request):
        empty = kind_of(Path(file)) == ".csv"  # in CSV an answer that is missing looks so
        for where, cells in found:
            if reason := _left_out(cells, request, empty):
                left_out[reason] += 1
            else:
                rows.append(_Row(where, model, cells))
    if not rows:
        reasons = ", ".join(f"{count} rows {reason}" for reason, count in left_out.items()) or "no rows"
        raise UserError(f"--answers {', '.join(request.files)}: no answer that has a label ({reasons})")
    scheme = label_scheme(
        request.label, [(row.where, row.cells[request.label]) for row in rows], request.true
    )
    return scheme, [_answer(row, request, scheme) for row in rows], left_out


def _answer(row: _Row, request: LabelledFiles, scheme: LabelScheme) -> LabelledAnswer:
    cells = row.cells
    prompt, answer = (_text(cells, column, row.where) for column in (request.prompt, request.answer))
    prompt = prompt.strip()  # a blank at its end does not make it another prompt than that of another model
    model = str(cells[request.model]).strip() if request.model else row.model
    parts = frozenset(
        f"{'' if _matches(cells, part) else 'other than '}{part[0]}={part[1]}" for part in request.parts
    )
    return LabelledAnswer(model, prompt, answer, scheme.classes[label_text(cells[request.label])], parts)


def _files(request: LabelledFiles) -> Iterator[tuple[str, str, Iterator[tuple[str, dict[str, Any]]]]]:
    """(file, the model that it is without --model, its rows) of each file."""
    places: set[Path] = set()
    models: dict[str, str] = {}
    for file in request.files:
        path = Path(file)
        if not path.is_file():
            raise UserError(f"--answers {file}: no such file")
        if path.resolve() in places:
            raise UserError(f"--answers {file}: stands there twice")
        places.add(path.resolve())
        model, rows = _read(file, request.columns)
        if request.model is None and models.setdefault(model, file) != file:
            raise UserError(
                f"--answers {models[model]} {file}: both would be the model {model}; rename one, or name the "
                "column of the model with --model"
            )
        yield file, model, _with_columns(rows, request.columns)


def _read(file: str, columns: Sequence[str]) -> tuple[str, Iterator[tuple[str, Any]]]:
    """The model that a file stands for, and (file and row, row) of every row."""
    path = Path(file)
    if (artifact := _artifact(path)) is not None:
        entries = enumerate(artifact.entries, 1)
        return artifact.attack, ((f"{file}, jailbreak {number}", entry) for number, entry in entries)
    rows = read_file(DataFile(path, file, frozenset(columns)))[0]
    return path.stem, ((f"{file}, row {number}", row) for number, row in rows)


def _artifact(path: Path) -> Artifact | None:
    if path.suffix != ".json":
        return None
    try:
        content = strict_json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # then whoever reads rows says what is wrong
        return None
    return Artifact.of(content, path) if is_artifact(content) else None


def _with_columns(
    rows: Iterator[tuple[str, Any]], columns: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows, each of which has the columns."""
    for where, row in rows:
        if isinstance(row, Unreadable):
            raise UserError(f"{where}: cannot be read ({row.reason})")
        if not isinstance(row, dict):
            raise UserError(f"{where}: expects an object")
        for column in columns:
            if column not in row:
                there = ", ".join(shown_name(name) for name in list(row)[:12])
                raise UserError(f"{where}: no column {column}; there are {there}")
        yield where, row


def _left_out(cells: dict[str, Any], request: LabelledFiles, empty: bool) -> str | None:
    """Why a row is not judged; None if it is. `empty`: whether an empty answer is none."""
    if request.only and not _matches(cells, request.only):
        return f"not {request.only[0]}={request.only[1]}"
    if cells[request.answer] is None or (empty and cells[request.answer] == ""):
        return "without an answer"
    if _is_blank(cells[request.label]):
        return "without a label"
    return "without a model" if request.model and _is_blank(cells[request.model]) else None


def _is_blank(cell: Any) -> bool:
    return cell is None or not str(cell).strip()


def _matches(cells: dict[str, Any], pattern: Pattern) -> bool:
    return fnmatchcase(str(cells[pattern[0]]), pattern[1])


def _text(cells: dict[str, Any], column: str, where: str) -> str:
    if not isinstance(cells[column], str):
        raise UserError(f"{where}, column {column}: expects text")
    return str(cells[column])
