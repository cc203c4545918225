"""What a search maximises: the objective and its constraint, measured from per-item scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bdpo.config import Config, TuneConfig
from bdpo.errors import UserError
from bdpo.evaluation.measures import measures, summarise
from bdpo.evaluation.tables import invalid_lines
from bdpo.search.space import Estimate

_MORE_IS_BETTER = {"safety", "safe_rate", "compliance", "unsafe_refusal", "correct", "correct_if_attempted"}


class InvalidEvaluation(Exception):
    """Too many verdicts are missing: there is no score, and none is made up."""


@dataclass(frozen=True)
class Measured:
    """What an evaluation says of a trial."""

    objective: Estimate
    """`tune.metric`, as `summarise` gives it."""
    constrained: Estimate
    """`tune.constraint`."""
    base: float
    """`tune.constraint` of the base model on the same prompts."""
    violation: float
    """How far `constrained` is below what it may be; not above 0 is feasible."""

    @property
    def score(self) -> float:
        """Ranks trials: the objective of a feasible one, less than any of those for the others.

        After Deb, "An efficient constraint handling method for genetic algorithms" (2000): of two trials
        that are not feasible the one that is less so is better. The objective is never below 0.
        """
        return float(self.objective["value"]) if self.violation <= 0 else -self.violation

    @property
    def rank(self) -> tuple[float, float]:
        """Of equal scores that of the one that complies more is higher."""
        return self.score, self.constrained["value"]


def check_measures(config: Config) -> None:
    """Make sure that metric and constraint are measured, and are better the more there is of them.

    Raises:
        UserError: naming those that are.
    """
    known = [f"{name}.{measure}" for name in config.evaluate.benchmarks for measure in measures(name)]
    wanted = [path for path in known if path.partition(".")[2] in _MORE_IS_BETTER]
    for key in ("metric", "constraint"):
        path = getattr(config.tune, key)
        if path not in wanted:
            why = "more of it is not better" if path in known else "is not measured"
            raise UserError(f"tune.{key}={path}: {why}; wants one of {', '.join(wanted)}")


def check_measured(tune: TuneConfig, base_scores: pa.Table, items: Sequence[str], which: str) -> None:
    """Make sure that `items`, on which trials are going to be measured, measure metric and constraint.

    Raises:
        UserError: the base model cannot be measured on them.
    """
    known = base_scores.filter(pc.is_in(base_scores["item_id"], pa.array(items, pa.string())))
    try:
        measure(tune, known, known)
    except InvalidEvaluation as error:
        raise UserError(f"{which}: {error}; no trial could be measured on them") from None


def measure(tune: TuneConfig, scores: pa.Table, base_scores: pa.Table) -> Measured:
    """Objective and constraint from per-item scores, the base model's on the same items.

    Raises:
        InvalidEvaluation: either has too many failed verdicts, or there is nothing to measure.
    """
    same = base_scores.filter(pc.is_in(base_scores["item_id"], scores["item_id"]))
    summary, base = _valid_summary("trial", scores), _valid_summary("base", same)
    objective, constrained = (_at(summary, path) for path in (tune.metric, tune.constraint))
    allowed = _at(base, tune.constraint)["value"] - tune.max_over_refusal
    # Rates of few prompts: what is equal on paper must not differ by rounding.
    violation = round(allowed - constrained["value"], 12)
    return Measured(objective, constrained, allowed + tune.max_over_refusal, violation)


def _valid_summary(name: str, scores: pa.Table) -> dict[str, Any]:
    summary = summarise(scores)
    if not summary["valid"]:
        raise InvalidEvaluation("; ".join(invalid_lines(name, summary)) or f"{name}: no scores")
    return summary


def _at(summary: dict[str, Any], path: str) -> Estimate:
    benchmark, _, name = path.partition(".")
    estimate: Estimate = summary["benchmarks"][benchmark][name]
    if estimate["value"] is None:
        raise InvalidEvaluation(f"{path}: no prompt of this part measures it")
    return estimate
