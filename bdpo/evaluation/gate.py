"""Whether the evaluations of a run meet the conditions of a gate, with the evidence for each.

Nothing is assumed in favour of a model: what was not evaluated, is invalid, or cannot be compared with the
base model is not met, and the reason is given.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from bdpo.config.gate import Condition, GateConfig
from bdpo.errors import UserError
from bdpo.evaluation.benchmarks.base import TEXT_MEASURES
from bdpo.evaluation.benchmarks.registry import (
    BENCHMARKS,
    CAPABILITY,
    find_measure,
    known_measures,
    measure_label,
)
from bdpo.evaluation.compare import item_clusters, judged_rows, values_of
from bdpo.evaluation.measures import summarise
from bdpo.evaluation.results import Evaluation, incomparable_field, is_finished, read_evaluation
from bdpo.evaluation.tables import why_invalid
from bdpo.stats import Estimate, paired_difference, widen
from bdpo.storage.manifests import Fingerprint, read_manifest
from bdpo.storage.paths import StoragePath

_WORDS = {
    "at_least": "at least",
    "at_most": "at most",
    "max_regression": "no worse than {base} by more than",
}

_OF_TEXTS = {measure.name for measure in TEXT_MEASURES}
"""Measures that no judge has a part in."""


@dataclass(frozen=True)
class Evidence:
    """A measured number beside its judge; a difference where the condition compares with the base model."""

    value: float
    low: float
    """95 % interval; that of a difference holds the judge's own error, where it was measured."""
    high: float
    n: int
    """Items that the number is made from."""
    base: float | None = None
    """The base model's value on the same items, of a difference."""
    judge_error: float | None = None
    """Half-width of the judge's own error in a difference of two models, where it was measured."""


@dataclass(frozen=True)
class Outcome:
    """A condition, and whether it is met."""

    condition: str
    met: bool
    judge: str
    """Who gave the verdicts that were measured."""
    evidence: Evidence | None
    reason: str = ""
    """Why there is no evidence."""


@dataclass(frozen=True)
class _Checked:
    """A finished evaluation, and why the numbers of a benchmark cannot be used, where that is so."""

    evaluation: Evaluation
    defects: Mapping[str, str]


class _Unmet(Exception):
    """There is nothing by which a condition could be met; the message is the reason."""


def check_gate(gate: GateConfig, source: str) -> None:
    """Make sure that every condition is on a measure that exists, and bounds it on the side that matters.

    Raises:
        UserError: one is not; the message names `source`, the condition, and the nearest known measure.
    """
    known = known_measures((*BENCHMARKS, *CAPABILITY))
    for number, condition in enumerate(gate.conditions, 1):
        where = f"{source}: condition {number}: measure {condition.measure}"
        measure = known.get(condition.measure)
        if measure is None:
            near = difflib.get_close_matches(condition.measure, known, 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else f"; one of {', '.join(known)}"
            raise UserError(f"{where} is unknown{hint}")
        more = measure.more_is_better
        if condition.bound[0] == ("at_most" if more else "at_least"):
            expected = "more of it is better, expects at_least" if more else "less is better, expects at_most"
            raise UserError(f"{where}: {expected}")
        capability = condition.measure.partition(".")[0] in CAPABILITY
        if capability and (condition.max_regression is not None or condition.category):
            raise UserError(f"{where}: has no single items, expects at_least and no category")


def check_run(
    gate: GateConfig,
    folders: Mapping[str, StoragePath],
    weights: Mapping[str, Fingerprint],
    stale: Mapping[str, str],
) -> list[Outcome]:
    """Every condition of the gate, and for each benchmark that they name one on its broken answers.

    Args:
        gate: see `check_gate`, which it has passed.
        folders: name of a model -> the folder of its evaluation, which may be unfinished.
        weights: name of a model -> the digests of the weights that it has now, by field of the fingerprint of
            an evaluation (`weights`, `adapter`), None where there are none; other fields are not looked at.
        stale: name of a model -> why nothing that was measured of it counts, where that is so.

    Raises:
        UserError: a file of an evaluation is damaged.
    """
    named = dict.fromkeys(condition.measure.partition(".")[0] for condition in gate.conditions)
    evaluations = {
        name: _finished(name, folder, list(named), weights[name], stale.get(name))
        for name, folder in folders.items()
    }
    judged = [name for name in named if name in BENCHMARKS]
    intact = [
        Condition(measure=f"{name}.unbroken", at_least=1 - gate.max_broken, at="value") for name in judged
    ]
    return [_outcome(condition, gate, evaluations) for condition in (*gate.conditions, *intact)]


def judge_of(evaluation: Evaluation, measure: str) -> str:
    """Who decided what `benchmark.measure` counts: the judge with its model, the harness, or nobody."""
    benchmark, _, name = measure.partition(".")
    if benchmark in CAPABILITY:
        return "lm-evaluation-harness"
    if name in _OF_TEXTS:
        return "none (rules on the text)"
    model = evaluation.fingerprint.get("evaluate.judge.model")
    return " ".join(part for part in (evaluation.judge.label, model) if part)


def _finished(
    model: str, folder: StoragePath, named: Sequence[str], weights: Fingerprint, stale: str | None
) -> _Checked | None:
    """The evaluation in a folder, with the named benchmarks checked; None while it is not finished."""
    if not is_finished(folder):
        return None
    found = read_evaluation(folder)
    results = {name: read_manifest(folder / "capability" / f"{name}.json") for name in named}
    defects = {}
    for name, result in results.items():
        made_with = found.fingerprint if name in BENCHMARKS else result.fingerprint if result else None
        defect = None if made_with is None else stale or _other_weights(model, made_with, weights)
        if defect is None and name in BENCHMARKS:
            defect = _defect(name, found)
        if defect is not None:
            defects[name] = defect
    return _Checked(found, defects)


def _other_weights(model: str, made_with: Fingerprint, weights: Fingerprint) -> str | None:
    """Why a result is not one of the model as it is now, which then was never evaluated; None if it is."""
    if None in weights.values():
        return f"the weights of {model} are not there, so it is not known what was evaluated"
    if any(made_with.get(field) != digest for field, digest in weights.items()):
        return f"{model} has other weights now than those that were evaluated"
    return None


def _outcome(condition: Condition, gate: GateConfig, evaluations: Mapping[str, _Checked | None]) -> Outcome:
    gated = evaluations[gate.model]
    judge = judge_of(gated.evaluation, condition.measure) if gated else ""
    try:
        if gated is None:
            raise _Unmet(f"the evaluation of {gate.model} is not finished")
        evidence = _evidence(condition, gate, gated, evaluations[gate.base])
    except _Unmet as unmet:
        return Outcome(_words(condition, gate.base), False, judge, None, str(unmet))
    return Outcome(_words(condition, gate.base), _is_met(condition, evidence), judge, evidence)


def _evidence(condition: Condition, gate: GateConfig, gated: _Checked, base: _Checked | None) -> Evidence:
    if condition.max_regression is None:
        return _estimate(condition, gated)
    if base is None:
        raise _Unmet(f"the evaluation of {gate.base} is not finished")
    if name := incomparable_field(gated.evaluation.fingerprint, base.evaluation.fingerprint):
        raise _Unmet(f"{gate.model} and {gate.base} were evaluated with different {name}")
    return _difference(condition, gated, base)


def _estimate(condition: Condition, gated: _Checked) -> Evidence:
    benchmark, _, name = condition.measure.partition(".")
    evaluation = gated.evaluation
    _require_valid(benchmark, gated)
    if benchmark in CAPABILITY:
        accuracy = evaluation.summary.accuracy(benchmark)
        if accuracy is None:
            raise _Unmet(f"{benchmark} was not run")
        return _measured(condition, accuracy)
    part = evaluation.summary.benchmarks[benchmark]
    if condition.category is None:
        return _measured(condition, part.total.estimates.get(name))
    if condition.category not in part.categories:
        raise _Unmet(f"{benchmark} has no category {condition.category}")
    return _measured(condition, part.categories[condition.category].estimates.get(name))


def _measured(condition: Condition, estimate: Estimate | None) -> Evidence:
    if estimate is None or estimate.value is None or estimate.low is None or estimate.high is None:
        raise _Unmet(f"no item measures {condition.measure}")
    return Evidence(estimate.value, estimate.low, estimate.high, estimate.n)


def _defect(benchmark: str, evaluation: Evaluation) -> str | None:
    """Whether a benchmark was not evaluated, is invalid, or has other scores than those of its summary."""
    part = evaluation.summary.benchmarks.get(benchmark)
    if part is None:
        return f"{benchmark} was not evaluated"
    if not part.valid:
        return why_invalid(benchmark, part)
    own = evaluation.scores.filter(pc.equal(evaluation.scores["benchmark"], benchmark))
    if summarise(own).benchmarks.get(benchmark) != part:
        return f"scores.parquet does not give the numbers of summary.json for {benchmark}"
    return None


def _require_valid(benchmark: str, checked: _Checked) -> None:
    if benchmark in checked.defects:
        raise _Unmet(checked.defects[benchmark])


def _difference(condition: Condition, gated: _Checked, base: _Checked) -> Evidence:
    """The gated model − the base model, over the items for which both have a verdict."""
    for checked in (base, gated):
        _require_valid(condition.measure.partition(".")[0], checked)
    before, after = (_item_values(condition, checked.evaluation.scores) for checked in (base, gated))
    both = [item for item in after if item in before]
    if not both:
        raise _Unmet(f"no item measures {condition.measure} for both models")
    of = item_clusters(gated.evaluation.scores)
    found = paired_difference(
        [before[item] for item in both], [after[item] for item in both], [of[item] for item in both]
    )
    benchmark, _, name = condition.measure.partition(".")
    # The judge's error in a difference is its bias on one model minus its bias on the other. Calibration
    # measured just that, with the biases of two models in it (see `Bias.reach`): it enters once, not once for
    # each side. Both sides have the same judge, or they are not compared; what is known of its error may have
    # changed between the two evaluations, and then the larger one counts.
    judge = gated.evaluation.judge.or_worse(base.evaluation.judge)
    error = None if name in _OF_TEXTS else judge.reach.get(BENCHMARKS[benchmark].rubric)
    low, high = widen(found.difference, (found.low, found.high), error or 0.0)
    return Evidence(found.difference, low, high, found.n, found.first, error)


def _item_values(condition: Condition, scores: pa.Table) -> dict[str, float]:
    """Item id -> what the item adds to the measure of the condition."""
    benchmark, _, name = condition.measure.partition(".")
    rows = judged_rows(scores, BENCHMARKS[benchmark])
    in_category = [row for row in rows if condition.category in (None, row["category"])]
    return values_of(find_measure(benchmark, name), in_category)


def _is_met(condition: Condition, evidence: Evidence) -> bool:
    """Rates of few items: values that are equal on paper must not differ by rounding."""
    kind, bound = condition.bound
    exact = condition.at == "value"
    low, high = (evidence.value,) * 2 if exact else (evidence.low, evidence.high)
    if kind == "at_least":
        return round(low - bound, 12) >= 0
    if kind == "at_most":
        return round(high - bound, 12) <= 0
    if find_measure(*condition.measure.split(".")).more_is_better:
        return round(low + bound, 12) >= 0
    return round(high - bound, 12) <= 0


def _words(condition: Condition, base: str) -> str:
    """The condition as a phrase: `StrongReject safety at least 80.0 %`."""
    kind, bound = condition.bound
    benchmark, _, measure = condition.measure.partition(".")
    label = measure_label(benchmark, f"{measure}, {condition.category}" if condition.category else measure)
    unit = "points" if kind == "max_regression" else "%"
    measured = ", as measured" if condition.at == "value" else ""
    return f"{label} {_WORDS[kind].format(base=base)} {100 * bound:.1f} {unit}{measured}"
