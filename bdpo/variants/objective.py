"""What variants are ranked by: the objective and its constraint, measured from per-item scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bdpo.config import Config, TuneConfig
from bdpo.errors import UserError
from bdpo.evaluation.benchmarks.registry import BENCHMARKS, known_measures
from bdpo.evaluation.measures import Summary, summarise
from bdpo.evaluation.tables import invalid_lines
from bdpo.stats import Estimate


class InvalidEvaluation(Exception):
    """Too many verdicts are missing to compute a score; no score is made up."""


@dataclass(frozen=True)
class Measured:
    """Objective and constraint of a variant, measured on the prompts of a search."""

    objective: Estimate
    """`tune.metric`, as `summarise` gives it."""
    constrained: Estimate
    """`tune.constraint`."""
    base: float
    """`tune.constraint` of the base model on the same prompts."""
    violation: float
    """How far `constrained` is below its bound, or `broken` if that is more; the variant is feasible if this
    is at most 0."""
    broken: float = 0.0
    """How far the share of broken answers is beyond `tune.max_broken` more than the base model's."""

    @property
    def score(self) -> float:
        """Ranks variants: the objective of a feasible one, a negative number for all others.

        After Deb, "An efficient constraint handling method for genetic algorithms" (2000): of two variants
        that are not feasible the one with the smaller violation is better. The objective is never below 0.
        """
        return self.objective.known if self.violation <= 0 else -self.violation

    @property
    def rank(self) -> tuple[float, float]:
        """The key of a ranking: of two equal scores the one with the higher constraint ranks higher."""
        return self.score, self.constrained.known

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Measured:
        """The inverse of `dataclasses.asdict`."""
        estimates = {key: Estimate(**values[key]) for key in ("objective", "constrained")}
        return cls(**values | estimates)


@dataclass(frozen=True)
class HeldOut:
    """The constraint of a search, checked again on the prompts that the search did not use."""

    holds: bool | None
    """None where the held-out prompts do not measure it."""
    sentence: str
    """The result as a sentence for terminal and page."""
    measured: Measured | None = None


def check_held_out(tune: TuneConfig, scores: pa.Table, base_scores: pa.Table) -> HeldOut:
    """Whether the chosen variant is within the bounds of the search on the held-out prompts, too.

    It was chosen as the best of many within the bound on other prompts, so that some of it is luck.

    Args:
        scores: per-item scores of the chosen variant on the held-out prompts.
        base_scores: those of the base model.
    """
    try:
        found = measure(tune, scores, base_scores)
    except InvalidEvaluation as error:
        return HeldOut(None, f"The constraint was not checked on the held-out prompts: {error}.")
    own, least = found.constrained, found.base - tune.max_over_refusal
    kept = "holds" if own.known >= round(least, 12) else "is violated"
    interval = f"95 % interval {_percent(own.low)} to {_percent(own.high)}"
    sentence = (
        f"On the held-out prompts the constraint {kept}: {tune.constraint} is "
        f"{_percent(own.value)} % ({interval}), and at least {_percent(least)} % is "
        f"required (base model {_percent(found.base)} %, tune.max_over_refusal={tune.max_over_refusal})."
    )
    if found.broken:
        sentence += (
            f" More of its answers are broken than tune.max_broken={tune.max_broken} allows, by "
            f"{_percent(found.broken)} points of percent: they are empty, repeat themselves or are no text."
        )
    return HeldOut(found.violation <= 0, sentence, found)


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.1f}"


def check_measures(config: Config) -> None:
    """Make sure that metric and constraint are measured, and that more of each is better.

    Raises:
        UserError: one is not; the message lists the measures that are.
    """
    known = known_measures(config.evaluate.benchmarks)
    usable = [path for path, measure in known.items() if measure.more_is_better]
    for key in ("metric", "constraint"):
        path = getattr(config.tune, key)
        if path not in usable:
            why = "more of it is not better" if path in known else "is not measured"
            raise UserError(f"tune.{key}={path}: {why}; requires one of {', '.join(usable)}")


def check_measured(tune: TuneConfig, base_scores: pa.Table, items: Sequence[str], which: str) -> None:
    """Make sure that metric and constraint can be measured on `items`, the prompts of the trials.

    Raises:
        UserError: the base model cannot be measured on them.
    """
    known = base_scores.filter(pc.is_in(base_scores["item_id"], pa.array(items, pa.string())))
    try:
        measure(tune, known, known)
    except InvalidEvaluation as error:
        raise UserError(f"{which}: {error}; no variant could be measured on them") from None


def measure(tune: TuneConfig, scores: pa.Table, base_scores: pa.Table) -> Measured:
    """Objective and constraint from the per-item scores of a variant and of the base model.

    Raises:
        InvalidEvaluation: either has too many failed verdicts, or there is nothing to measure.
    """
    same = base_scores.filter(pc.is_in(base_scores["item_id"], scores["item_id"]))
    summary = require_valid("variant", summarise(scores))
    base = require_valid("base", summarise(same))
    objective, constrained = (_at(summary, path) for path in (tune.metric, tune.constraint))
    allowed = _at(base, tune.constraint).known - tune.max_over_refusal
    broken = max((_more_broken(summary, base, of) for of in _benchmarks(tune)), default=0.0) - tune.max_broken
    # Rates of few prompts: values that are equal on paper must not differ by rounding.
    violation = round(max(allowed - constrained.known, broken), 12)
    return Measured(
        objective, constrained, allowed + tune.max_over_refusal, violation, max(round(broken, 12), 0.0)
    )


def _benchmarks(tune: TuneConfig) -> list[str]:
    """The benchmarks of metric and constraint whose answers are read: a capability has none."""
    named = dict.fromkeys(path.partition(".")[0] for path in (tune.metric, tune.constraint))
    return [name for name in named if name in BENCHMARKS]


def _more_broken(summary: Summary, base: Summary, benchmark: str) -> float:
    """How much larger the share of broken answers is than that of the base model; 0 where it is not known."""
    path = f"{benchmark}.unbroken"
    of_base, own = base.estimate(path).value, summary.estimate(path).value
    return 0.0 if of_base is None or own is None else of_base - own


def require_valid(name: str, summary: Summary) -> Summary:
    """The summary of the evaluation called `name`.

    Raises:
        InvalidEvaluation: too many verdicts are missing, or there are none.
    """
    if not summary.valid:
        raise InvalidEvaluation("; ".join(invalid_lines(name, summary)) or f"{name}: no scores")
    return summary


def _at(summary: Summary, path: str) -> Estimate:
    estimate = summary.estimate(path)
    if estimate.value is None:
        raise InvalidEvaluation(f"{path}: no prompt of this part measures it")
    return estimate
