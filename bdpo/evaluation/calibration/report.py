"""The result of a calibration: as JSON, and as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from bdpo.evaluation.calibration.agreement import (
    Agreement,
    Opinion,
    agreement,
    label_opinion,
)
from bdpo.evaluation.calibration.bias import (
    FEWEST_MODELS,
    FEWEST_PROMPTS,
    Bias,
    ModelRates,
    bias_between_models,
)
from bdpo.evaluation.calibration.labels import LabelledAnswer, LabelScheme
from bdpo.evaluation.measures import MAX_FAILED_FRACTION
from bdpo.evaluation.tables import counts_text, percent
from bdpo.stats import CONFIDENCE_LEVEL, points_of

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class JudgeCalibration:
    """One judge against the labels."""

    opinion: Opinion
    agreement: Agreement
    bias: Bias | None

    def to_json(self) -> dict[str, object]:
        """Counts, agreement with the labels, and the bias between models."""
        return {
            **self.agreement.to_json(),
            "contradictions": self.opinion.contradictions,
            "failed": sum(self.opinion.failures.values()),
            "failures": self.opinion.failures,
            "bias": None if self.bias is None else asdict(self.bias),
        }


@dataclass(frozen=True)
class Calibration:
    """Judges against the labels of the same answers, and against each other."""

    scheme: LabelScheme
    answers: Sequence[LabelledAnswer]
    judges: Mapping[str, JudgeCalibration]
    between: Mapping[tuple[str, str], Agreement]

    def to_json(self) -> dict[str, object]:
        """What `agreement.json` holds: counts and rates, no text of an answer."""
        return {
            "rubric": self.scheme.rubric,
            "labels": self.scheme.classes,
            "n": len(self.answers),
            "models": list(dict.fromkeys(answer.model for answer in self.answers)),
            "judges": {name: found.to_json() for name, found in self.judges.items()},
            "between_judges": [
                {"judges": list(pair), **found.to_json()} for pair, found in self.between.items()
            ],
        }


def calibrate(
    scheme: LabelScheme, answers: Sequence[LabelledAnswer], opinions: Sequence[Opinion]
) -> Calibration:
    """Set opinions beside the labels and beside each other."""
    labels, prompts = label_opinion(answers), [answer.request for answer in answers]
    judges = {
        own.judge: JudgeCalibration(own, agreement(labels, own, prompts), bias_between_models(own, answers))
        for own in opinions
    }
    between = {
        (first.judge, second.judge): agreement(first, second, prompts)
        for first, second in combinations(opinions, 2)
    }
    return Calibration(scheme, answers, judges, between)


def agreement_table(found: Calibration) -> Table:
    """Each judge against the labels, then every two judges."""
    table = _table(
        ("judge", "against", "n", "agreement", "kappa", "contra-\ndictions", "no verdict"),
        f"agreement in percent ({CONFIDENCE_LEVEL:.0%} interval, over prompts); {_what(found)}",
    )
    for name, judge in found.judges.items():
        contradictions = judge.opinion.contradictions
        failures = counts_text(judge.opinion.failures) or "0"
        more = ("–" if contradictions is None else str(contradictions), failures)
        _add(table, (name, "labels", *_agreement_cells(judge.agreement), *more))
    for pair, between in found.between.items():
        _add(table, (*pair, *_agreement_cells(between), "", ""))
    return table


def confusion_table(found: Calibration) -> Table:
    """The verdicts of each judge on the answers of each label."""
    table = _table(("judge", "label", "verdicts"), "answers by label and verdict")
    for name, judge in found.judges.items():
        for label, verdicts in judge.agreement.confusion.items():
            _add(table, (name, label, ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())))
    return table


def bias_table(found: Calibration) -> Table:
    """The rate of each model by the labels and by each judge."""
    biases = {name: judge.bias for name, judge in found.judges.items() if judge.bias}
    table = _table(
        ("model", "prompts", "labels", *biases),
        f"percent {_positive(found)}, mean over prompts; invalid: more than {MAX_FAILED_FRACTION:.0%} of the "
        "verdicts are missing",
    )
    for model in dict.fromkeys(answer.model for answer in found.answers):
        rates = [bias.rates[model] for bias in biases.values()]
        for own in rates[:1]:  # prompts and labels are those of the answers, the same beside every judge
            cells = (model, str(own.prompts), f"{100 * own.labels:.1f}", *map(_judged, rates))
            _add(table, cells)
    return table


def _judged(rates: ModelRates) -> str:
    return f"{100 * rates.judge:.1f}" if rates.valid and rates.judge is not None else "invalid"


def difference_lines(found: Calibration) -> Iterator[str]:
    """For every judge its error between models, then every two models: whether it distinguishes them; last
    the models that cannot be compared."""
    for name, judge in found.judges.items():
        if judge.bias is None:
            yield f"{name}: one model; its bias between models is unknown (--model, or a file for each)"
            continue
        yield f"{name}: {_error_line(judge.bias)}"
        for pair in judge.bias.differences:
            labels = points_of(pair.labels, pair.labels_low, pair.labels_high) or "no verdict"
            own = points_of(pair.judge, pair.judge_low, pair.judge_high) or "no verdict"
            end = pair.doubt or "the order of the labels"
            yield f"  {' → '.join(pair.models)}, n {pair.n}: labels {labels}, {name} {own}: {end}"
    yield from _apart(found)


def _apart(found: Calibration) -> Iterator[str]:
    """A line that names every two models that were not asked the same prompts; none if all were."""
    asked: dict[str, set[str]] = {}
    for answer in found.answers:
        asked.setdefault(answer.model, set()).add(answer.request)
    apart = [f"{one} and {other}" for one, other in combinations(asked, 2) if not asked[one] & asked[other]]
    if apart:
        yield f"not compared, as they have no prompt in common: {', '.join(apart)}"


def _error_line(bias: Bias) -> str:
    if bias.reach is None or bias.sd is None:
        return (
            f"its error between two models is unknown: that takes {FEWEST_MODELS} models with "
            f"{FEWEST_PROMPTS} prompts or more and verdicts on {1 - MAX_FAILED_FRACTION:.0%} of their answers"
        )
    parts = "".join(
        f", {part}: unknown" if reach is None else f", {part}: ±{100 * reach:.1f}"
        for part, reach in bias.parts.items()
    )
    return (
        f"its error between two models is ±{100 * bias.reach:.1f} points "
        f"(sd {100 * bias.sd:.1f} over {bias.models} models{parts})"
    )


def _agreement_cells(found: Agreement) -> tuple[str, str, str]:
    kappa = "–" if found.kappa is None else f"{found.kappa:.2f}"
    return str(found.n), percent(found.accuracy) or "–", kappa


def _positive(found: Calibration) -> str:
    return "refused" if found.scheme.rubric == "refusal" else "safe"


def _what(found: Calibration) -> str:
    positive = _positive(found)
    return f"agreement and kappa: {positive} or not; contradiction: refused and harmful at once"


def _table(columns: Sequence[str], caption: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(caption=caption)
    for column in columns:
        left = column in ("judge", "against", "label", "model", "verdicts")
        number = column in ("n", "agreement", "kappa")  # kept whole where the terminal is narrow
        table.add_column(Text(column), justify="left" if left else "right", no_wrap=number, overflow="fold")
    return table


def _add(table: Table, cells: Sequence[str]) -> None:
    from rich.text import Text

    table.add_row(*(Text(cell) for cell in cells))
