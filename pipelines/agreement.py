"""Calibrate judges: how far they agree with labels, with each other, and between models.

    python -m pipelines.agreement --answers FILE [FILE ...] --prompt COLUMN --answer COLUMN --label COLUMN
        --judges string_matching [JUDGE ...] --out DIR

FILE is JSON Lines, JSON, CSV or Parquet, or an artifact of JailbreakBench or of the past-tense attack. A
judge is a name, or a YAML mapping with the keys of `evaluate.judge`:
'{name: rubric, base_url: http://localhost:8000/v1, model: qwen}'. Labels are words (full_refusal, ...) or
flags (true, 0, ...), whose meaning the column's name gives (unsafe, refused, ...) or --true. Several files
are several models, unless --model names a column; an artifact is called after its attack and the attacked
model.

Writes DIR/agreement.json and prints it: for each judge n, accuracy, kappa, confusion and contradictions; for
every two judges their agreement; for every two models the difference by the labels and by each judge, and
whether it is beyond that judge. Verdicts are asked for by every rubric that a judge has. --part measures
the error between models on a part of the answers and on the others as well, and the largest counts.

--fit FILE fits the judge `fitted` on the answers (evaluate.judge: {name: fitted, path: FILE}), and measures
it on each model by a classifier that was fitted on the others.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bdpo.config import SANDBOX, Config, parse_config
from bdpo.config.reading import parse_override
from bdpo.errors import UserError
from bdpo.storage.manifests import write_manifest
from bdpo.storage.paths import StoragePath, storage_path
from pipelines.runtime.cli import exit_codes, one_line_when_full
from pipelines.runtime.labelled_answers import LabelledFiles, Pattern, read_answers
from pipelines.runtime.progress import console, progress_bar

if TYPE_CHECKING:
    from bdpo.evaluation.calibration.agreement import Opinion
    from bdpo.evaluation.calibration.labels import LabelledAnswer
    from bdpo.evaluation.calibration.report import Calibration
    from bdpo.evaluation.judges.base import RubricName


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
    from bdpo.evaluation.calibration.bias import bias_between_models
    from bdpo.evaluation.calibration.fitting import CROSS_VALIDATED, cross_validate, fit

    with progress_bar(CROSS_VALIDATED, len(answers)) as advance:
        found = cross_validate(answers, rubric, advance)
    bias = bias_between_models(found, answers)
    classifier = fit(answers, rubric).with_reach(bias.reach if bias else None)
    with one_line_when_full(f"--fit {file}"):
        classifier.write(storage_path(file, "--fit"))
    return found


def run_agreement(request: LabelledFiles, judges: Sequence[str], out: str, fit: str | None = None) -> None:
    """Judge the answers, write `agreement.json`, print it."""
    from bdpo.evaluation.calibration.report import calibrate
    from bdpo.evaluation.judges.registry import judge_fingerprint
    from bdpo.storage.digests import sha256

    configs = judge_configs(judges)
    scheme, answers, left_out = read_answers(request)
    console.print(f"{len(answers)} answers; column {request.label}: {scheme.describe()}", soft_wrap=True)
    for reason, count in left_out.items():
        console.print(f"{count} rows left out: {reason}", style="yellow", soft_wrap=True)
    folder = output_folder(out, "--out")
    if fit:
        check_fit(fit, answers)
    asked = opinions(configs, scheme.rubric, answers)
    found = calibrate(scheme, answers, [*asked, *([fitted(fit, scheme.rubric, answers)] if fit else [])])
    fingerprint = {
        "answers": [sha256(Path(file)) for file in request.files],
        "columns": list(request.columns),
        "label": request.label,
        "only": request.only,
        "parts": list(request.parts),
        "judges": {name: judge_fingerprint(config) for name, config in configs.items()},
    }
    with one_line_when_full(f"--out {out}"):
        write_manifest(folder / "agreement.json", fingerprint, left_out=dict(left_out), **found.to_json())
    print_calibration(found)
    console.print(f"{folder / 'agreement.json'}", soft_wrap=True)


def output_folder(name: str, key: str) -> StoragePath:
    """The folder for what is written, made before any judge is asked.

    Raises:
        UserError: it cannot be made, or nothing can be written in it.
    """
    folder = storage_path(name, key)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{key} {name}: a file is where the folder would be") from None
    except OSError as error:
        raise UserError(f"{key} {name}: the folder cannot be made ({error.strerror})") from None
    if isinstance(folder, Path) and not os.access(folder, os.W_OK):
        raise UserError(f"{key} {name}: the folder cannot be written in")
    return folder


def check_fit(file: str, answers: Sequence[LabelledAnswer]) -> None:
    """What would stop the fitting stops it before any judge is asked.

    Raises:
        UserError: the file cannot be written there, or there are too few answers of a class.
    """
    from bdpo.evaluation.calibration.fitting import require_enough

    path = storage_path(file, "--fit")
    if path.is_dir():
        raise UserError(f"--fit {file}: is a folder, expects a file")
    output_folder(str(path.parent), "--fit")
    require_enough(answers)


def print_calibration(found: Calibration) -> None:
    """Agreement, confusion and rates as tables; a line for every two models."""
    from bdpo.evaluation.calibration.report import (
        agreement_table,
        bias_table,
        confusion_table,
        difference_lines,
    )

    console.print(agreement_table(found))
    console.print(confusion_table(found))
    if any(judge.bias for judge in found.judges.values()):  # of one model there is nothing to compare
        console.print(bias_table(found))
    for line in difference_lines(found):
        console.print(line, soft_wrap=True)


def _pattern(text: str) -> Pattern:
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
    add(
        "--part",
        type=_pattern,
        nargs="+",
        action="extend",
        default=[],
        metavar="COLUMN=PATTERN",
        help="the error between models is also measured on the rows whose cell matches, and on the others",
    )
    add("--true", choices=("unsafe", "safe", "refused", "complied"), help="what a flag that is set means")
    add("--judges", required=True, nargs="+", metavar="JUDGE", help="a name, or '{name: …, key: value}'")
    add("--fit", metavar="FILE", help="fit the judge `fitted` on these answers, and write it here")
    add("--out", required=True, metavar="DIR", help="folder for agreement.json")
    given = parser.parse_args(arguments)
    request = LabelledFiles(
        tuple(given.answers),
        given.prompt,
        given.answer,
        given.label,
        given.model,
        given.only,
        given.true,
        tuple(given.part),
    )
    with exit_codes():
        run_agreement(request, given.judges, given.out, given.fit)


if __name__ == "__main__":
    main()
