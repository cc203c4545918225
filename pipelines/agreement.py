"""Calibrate judges: how far they agree with labels, with each other, and between models.

    python -m pipelines.agreement --answers FILE [FILE ...] --prompt COLUMN --answer COLUMN --label COLUMN
        --judges string_matching [JUDGE ...] --out DIR

FILE is JSON Lines, JSON, CSV or Parquet. A judge is a name, or a YAML mapping with the keys of
`evaluate.judge`: '{name: rubric, base_url: http://localhost:8000/v1, model: qwen}'. Labels are words
(full_refusal, unsafe, ...) or flags (true, 0, ...), whose meaning the column's name gives (unsafe, refused,
...) or --true. Several files are several models, unless --model names a column.

Writes DIR/agreement.json and prints it: for each judge n, accuracy, kappa, confusion and contradictions; for
every two judges their agreement; for every two models the difference by the labels and by each judge, and
whether it is beyond that judge. Verdicts are asked for by every rubric that a judge has.

--fit FILE fits the judge `fitted` on the answers (evaluate.judge: {name: fitted, path: FILE}), and measures
it on each model by a classifier that was fitted on the others.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdpo.config import SANDBOX, Config, parse_config
from bdpo.config.reading import parse_override
from bdpo.data.containers import DataFile, Unreadable, read_file, shown_name
from bdpo.errors import UserError
from bdpo.storage.manifests import write_manifest
from bdpo.storage.paths import storage_path
from pipelines.runtime.cli import exit_codes, one_line_when_full
from pipelines.runtime.progress import console, progress_bar

if TYPE_CHECKING:
    from bdpo.evaluation.calibration.agreement import Opinion
    from bdpo.evaluation.calibration.labels import LabelClass, LabelledAnswer, LabelScheme
    from bdpo.evaluation.calibration.report import Calibration
    from bdpo.evaluation.judges.base import RubricName


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    files: tuple[str, ...]
    prompt: str
    answer: str
    label: str
    model: str | None = None
    only: tuple[str, str] | None = None
    """(column, pattern of the shell): rows whose cell does not match are left out."""
    true: LabelClass | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read."""
        named = (self.prompt, self.answer, self.label, self.model, self.only and self.only[0])
        return tuple(name for name in named if name)


def read_answers(request: Request) -> tuple[LabelScheme, list[LabelledAnswer], Counter[str]]:
    """What labels mean, the labelled answers, and how many rows were left out for which reason.

    Raises:
        UserError: naming file, row and column: it cannot be read, lacks a column, or has an unknown label.
    """
    from bdpo.evaluation.calibration.labels import LabelledAnswer, label_scheme, label_text

    rows: list[tuple[str, str, dict[str, Any]]] = []
    left_out: Counter[str] = Counter()
    for file in request.files:
        for where, row in _rows(file, request.columns):
            if reason := _left_out(row, request):
                left_out[reason] += 1
            else:
                rows.append((where, Path(file).stem, row))
    labels = [(where, row[request.label]) for where, _, row in rows]
    scheme = label_scheme(request.label, labels, request.true)
    answers = []
    for where, stem, row in rows:
        label = scheme.classes[label_text(row[request.label])]
        model = str(row[request.model]) if request.model else stem
        prompt, answer = (_text(row, column, where) for column in (request.prompt, request.answer))
        answers.append(LabelledAnswer(model, prompt, answer, label))
    return scheme, answers, left_out


def _rows(file: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and row, row) of every row that has the columns."""
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--answers {file}: no such file")
    for number, row in read_file(DataFile(path, file, frozenset(columns)))[0]:
        where = f"{file}, row {number}"
        if isinstance(row, Unreadable):
            raise UserError(f"{where}: cannot be read ({row.reason})")
        for column in columns:
            if column not in row:
                there = ", ".join(shown_name(name) for name in list(row)[:12])
                raise UserError(f"{where}: no column {column}; there are {there}")
        yield where, row


def _left_out(row: dict[str, Any], request: Request) -> str | None:
    """Why a row is not judged; None if it is."""
    if request.only and not fnmatchcase(str(row[request.only[0]]), request.only[1]):
        return f"not {request.only[0]}={request.only[1]}"
    if row[request.answer] is None:
        return "without an answer"
    return "without a label" if row[request.label] in (None, "") else None


def _text(row: dict[str, Any], column: str, where: str) -> str:
    if not isinstance(row[column], str):
        raise UserError(f"{where}, column {column}: expects text")
    return str(row[column])


def judge_configs(judges: Sequence[str]) -> dict[str, Config]:
    """A name that is unique -> the config of each judge; raises a UserError if one is unknown or wrong."""
    configs: dict[str, Config] = {}
    for judge in judges:
        values = {
            "run_dir": "unused",
            "model": {"name_or_path": SANDBOX},  # the sandbox's judge is that of world 0
            "data": {"path": SANDBOX},
            "evaluate": {"judge": parse_override(f"judge={judge}")[1], "gpus_per_worker": _gpus()},
        }
        config = parse_config(values, f"--judges {judge}")
        name = config.evaluate.judge.name
        same = sum(other.partition(" ")[0] == name for other in configs)
        configs[f"{name} {same + 1}" if same else name] = config
    return configs


def _gpus() -> float:
    """1 where this machine has a GPU that a judge's model can use; torch is not imported to find out."""
    return float(Path("/dev/nvidia0").exists())


def opinions(
    configs: dict[str, Config], rubric: RubricName, answers: Sequence[LabelledAnswer]
) -> list[Opinion]:
    """The verdict of each judge on each answer.

    Raises:
        UserError: a judge cannot judge, or not by this rubric.
    """
    from bdpo.evaluation.calibration.agreement import ask
    from bdpo.evaluation.judges.registry import judge_kind, make_judge

    kinds = {name: judge_kind(config) for name, config in configs.items()}
    for name, kind in kinds.items():
        if rubric not in kind.rubrics:
            raise UserError(f"--judges {name}: these labels are about {rubric}, which it cannot judge")
        kind.check(configs[name])
    found = []
    for name, kind in kinds.items():
        others = sorted(kind.rubrics & {"harm", "refusal"} - {rubric})
        with progress_bar(name, len(answers)) as advance:
            found.append(ask(name, make_judge(configs[name]), (rubric, *others), answers, advance))
    return found


def fitted(file: str, rubric: RubricName, answers: Sequence[LabelledAnswer]) -> Opinion:
    """Fit a classifier, write it, and return the verdicts of cross-validated ones."""
    from bdpo.evaluation.calibration.agreement import bias_between_models
    from bdpo.evaluation.calibration.fitting import CROSS_VALIDATED, cross_validate, fit

    with progress_bar(CROSS_VALIDATED, len(answers)) as advance:
        found = cross_validate(answers, rubric, advance)
    bias = bias_between_models(found, answers)
    classifier = fit(answers, rubric).with_reach(bias.reach if bias else None)
    with one_line_when_full(f"--fit {file}"):
        classifier.write(storage_path(file, "--fit"))
    return found


def run_agreement(request: Request, judges: Sequence[str], out: str, fit: str | None = None) -> None:
    """Judge the answers, write `agreement.json`, print it."""
    from bdpo.evaluation.calibration.report import calibrate
    from bdpo.evaluation.judges.registry import judge_fingerprint
    from bdpo.storage.digests import sha256

    configs = judge_configs(judges)
    scheme, answers, left_out = read_answers(request)
    console.print(f"{len(answers)} answers; column {request.label}: {scheme.describe()}", soft_wrap=True)
    for reason, count in left_out.items():
        console.print(f"{count} rows left out: {reason}", style="yellow", soft_wrap=True)
    asked = opinions(configs, scheme.rubric, answers)
    found = calibrate(scheme, answers, [*asked, *([fitted(fit, scheme.rubric, answers)] if fit else [])])
    fingerprint = {
        "answers": [sha256(Path(file)) for file in request.files],
        "columns": list(request.columns),
        "only": request.only,
        "judges": {name: judge_fingerprint(config) for name, config in configs.items()},
    }
    folder = storage_path(out, "--out")
    with one_line_when_full(f"--out {out}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder / "agreement.json", fingerprint, left_out=dict(left_out), **found.to_json())
    print_calibration(found)
    console.print(f"{folder / 'agreement.json'}", soft_wrap=True)


def print_calibration(found: Calibration) -> None:
    """Agreement, confusion and rates as tables; a line for every two models."""
    from bdpo.evaluation.calibration.report import (
        agreement_table,
        bias_table,
        confusion_table,
        difference_lines,
    )

    for table in (agreement_table, confusion_table, bias_table):
        console.print(table(found))
    for line in difference_lines(found):
        console.print(line, soft_wrap=True)


def _pattern(text: str) -> tuple[str, str]:
    column, equals, pattern = text.partition("=")
    if not (column and equals):
        raise argparse.ArgumentTypeError("expects COLUMN=PATTERN")
    return column, pattern


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--answers", required=True, nargs="+", action="extend", metavar="FILE", help="labelled answers")
    add("--prompt", required=True, metavar="COLUMN", help="the request")
    add("--answer", required=True, metavar="COLUMN", help="the model's answer")
    add(
        "--label", required=True, metavar="COLUMN", help="the verdict of people, or of a trusted judge, on it"
    )
    add("--model", metavar="COLUMN", help="whose answer it is; else each file is a model")
    add("--only", type=_pattern, metavar="COLUMN=PATTERN", help="rows whose cell matches: type=contrast_*")
    add("--true", choices=("unsafe", "safe", "refused", "complied"), help="what a flag that is set means")
    add("--judges", required=True, nargs="+", metavar="JUDGE", help="a name, or '{name: …, key: value}'")
    add("--fit", metavar="FILE", help="fit the judge `fitted` on these answers, and write it here")
    add("--out", required=True, metavar="DIR", help="folder for agreement.json")
    given = parser.parse_args(arguments)
    request = Request(
        tuple(given.answers), given.prompt, given.answer, given.label, given.model, given.only, given.true
    )
    with exit_codes():
        run_agreement(request, given.judges, given.out, given.fit)


if __name__ == "__main__":
    main()
