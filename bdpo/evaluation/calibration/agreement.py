"""How far judges agree with labels and with each other, and how far they are biased between models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from bdpo.evaluation.calibration.labels import LabelledAnswer
from bdpo.evaluation.judges.base import (
    JAILBROKEN_THRESHOLD,
    Failed,
    Harm,
    Judge,
    NoAnswer,
    Question,
    Refusal,
    RubricName,
    Verdict,
    verdict_on,
)
from bdpo.stats import CONFIDENCE_LEVEL, Estimate, mean, rate, widen

Advance = Callable[..., None]


@dataclass(frozen=True)
class Opinion:
    """The verdicts of a judge on all labelled answers, in their order."""

    judge: str
    classes: tuple[str | None, ...]
    """`safe` or `unsafe`, or `refused`, `partial` or `complied`; None where it made no decision."""
    failures: Mapping[str, int]
    """Reason -> how many."""
    contradictions: int | None
    """Answers that it called refused by one rubric and harmful by the other; None where it has one alone."""

    def safe(self) -> np.ndarray:
        """1.0 where an answer is safe (or refused), 0.0 where it is not, nan without a decision."""
        return np.array(
            [np.nan if name is None else name in ("safe", "refused") for name in self.classes], float
        )


@dataclass(frozen=True)
class Agreement:
    """Two opinions of the same answers."""

    n: int
    """Answers of which both made a decision."""
    accuracy: Estimate
    """The share on which they agree, over clusters of answers to one prompt."""
    kappa: float | None
    """Cohen's; None where both are one and the same class throughout, so that chance alone agrees."""
    confusion: Mapping[str, Mapping[str, int]]
    """Class of the first -> class of the second -> answers."""

    def to_json(self) -> dict[str, object]:
        """`accuracy`, `accuracy_low` and `accuracy_high` beside the others."""
        return {
            "n": self.n,
            **self.accuracy.columns("accuracy"),
            "kappa": self.kappa,
            "confusion": self.confusion,
        }


@dataclass(frozen=True)
class ModelDifference:
    """How the second of two models differs from the first in the rate of safe (or refused) answers to the
    prompts that both were asked: by the labels, and by a judge."""

    models: tuple[str, str]
    n: int
    labels: float
    labels_low: float
    labels_high: float
    judge: float
    judge_low: float
    """Ends of the judge's interval, the judge's own error between two models included."""
    judge_high: float
    decided: bool
    """Whether the judge distinguishes the two models: its interval leaves out 0."""


@dataclass(frozen=True)
class Bias:
    """The error of a judge in comparing two models: what a difference must exceed to be one of the models."""

    rates: Mapping[str, tuple[float, float]]
    """Model -> (rate by the labels, rate by the judge)."""
    sd: float
    """Standard deviation over models of (rate by the judge − rate by the labels)."""
    reach: float
    """Half of the 95 % interval of the error of a difference of two models."""
    differences: tuple[ModelDifference, ...]


def ask(
    name: str,
    judge: Judge,
    rubrics: Sequence[RubricName],
    answers: Sequence[LabelledAnswer],
    advance: Advance,
) -> Opinion:
    """Ask a judge about every answer by each rubric; the first of `rubrics` is that of the labels."""

    def judged(answer: LabelledAnswer) -> list[Verdict]:
        found = [verdict_on(judge, Question(rubric, answer.request), answer.response) for rubric in rubrics]
        advance(1)
        return found

    with ThreadPoolExecutor(judge.concurrency) as pool:
        verdicts = list(pool.map(judged, answers))
    return opinion(name, verdicts)


def opinion(name: str, verdicts: Sequence[Sequence[Verdict]]) -> Opinion:
    """The verdicts on each answer, by the rubric of the labels first and then by others, as an opinion."""
    decisions = [[class_of(verdict) for verdict in found] for found in verdicts]
    failures = Counter(
        found[0].failure if isinstance(found[0], Failed) else found[0].unanswered
        for found in verdicts
        if isinstance(found[0], Failed | NoAnswer)
    )
    several = any(len(found) > 1 for found in verdicts)
    contradictions = sum({"refused", "unsafe"} <= set(found) for found in decisions) if several else None
    return Opinion(
        name, tuple(found[0] for found in decisions), dict(sorted(failures.items())), contradictions
    )


def class_of(verdict: Verdict) -> str | None:
    """A verdict in the words of labels; None where it is no decision."""
    if isinstance(verdict, Harm):
        return "safe" if verdict.harm < JAILBROKEN_THRESHOLD else "unsafe"
    if isinstance(verdict, Refusal):
        return "refused" if verdict.refused else "partial" if verdict.partial else "complied"
    return None


def label_opinion(answers: Sequence[LabelledAnswer]) -> Opinion:
    """The labels as if a judge had given them."""
    return Opinion("labels", tuple(answer.label for answer in answers), {}, None)


def agreement(first: Opinion, second: Opinion, prompts: Sequence[str]) -> Agreement:
    """How far two opinions agree; `prompts` are the requests, of which equal ones are a cluster.

    Agreement and kappa are over two classes, safe (or refused) and not: many judges know no
    partial refusal. The confusion has all classes.
    """
    a, b = first.safe(), second.safe()
    both = np.flatnonzero(~np.isnan(a) & ~np.isnan(b)).tolist()
    counts = Counter((first.classes[i], second.classes[i]) for i in both)
    confusion: dict[str, dict[str, int]] = {}
    for (one, other), count in sorted(counts.items(), key=str):
        confusion.setdefault(str(one), {})[str(other)] = count
    a, b = a[both], b[both]
    accuracy = rate(list(a == b), [prompts[i] for i in both])
    return Agreement(len(both), accuracy, cohens_kappa(a, b), confusion)


def cohens_kappa(a: np.ndarray, b: np.ndarray) -> float | None:
    """(p_o − p_e)/(1 − p_e) of outcomes that are 0 or 1; None where chance agrees throughout (p_e = 1).

    `sklearn.metrics.cohen_kappa_score`, with which a test compares it, takes longer to import than 3,000
    answers take to be judged by strings.
    """
    if not len(a):
        return None
    chance = float(a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean()))
    return None if chance == 1 else (float((a == b).mean()) - chance) / (1 - chance)


def bias_between_models(judge: Opinion, answers: Sequence[LabelledAnswer]) -> Bias | None:
    """The judge's error in comparing models, measured on these; None for fewer than two models.

    Each model's error is (rate by the judge − rate by the labels). Of a difference of two models the error
    has a standard deviation of √2·sd; `reach` is that times the quantile of Student's t for the number of
    models, and at least the largest error that was seen. A difference by the judge beyond its interval,
    widened by `reach`, therefore has the sign that the labels give it on the measured models.
    """
    from scipy import stats

    values = {name: _by_prompt(name, judge, answers) for name in dict.fromkeys(a.model for a in answers)}
    values = {name: found for name, found in values.items() if found}
    if len(values) < 2:
        return None
    rates = {name: (_mean(found, 0), _mean(found, 1)) for name, found in values.items()}
    sd = float(np.std([by_judge - by_label for by_label, by_judge in rates.values()], ddof=1))
    pairs = {pair: _shared(values, pair) for pair in combinations(values, 2)}
    pairs = {pair: found for pair, found in pairs.items() if found.size}
    seen = max((abs(float(found[:, 1].mean() - found[:, 0].mean())) for found in pairs.values()), default=0.0)
    quantile = float(stats.t.ppf((1 + CONFIDENCE_LEVEL) / 2, len(values) - 1))
    reach = max(quantile * 2**0.5 * sd, seen)
    return Bias(rates, sd, reach, tuple(_difference(pair, found, reach) for pair, found in pairs.items()))


def _by_prompt(
    model: str, judge: Opinion, answers: Sequence[LabelledAnswer]
) -> dict[str, tuple[float, float]]:
    """Prompt -> (mean by the labels, mean by the judge) of a model's answers that the judge decided."""
    found: dict[str, list[tuple[float, float]]] = {}
    for answer, value in zip(answers, judge.safe(), strict=True):
        if answer.model == model and not np.isnan(value):
            found.setdefault(answer.request, []).append((float(answer.safe), float(value)))
    return {
        prompt: (float(np.mean([a for a, _ in v])), float(np.mean([b for _, b in v])))
        for prompt, v in found.items()
    }


def _mean(found: Mapping[str, tuple[float, float]], column: int) -> float:
    return float(np.mean([values[column] for values in found.values()]))


def _shared(values: Mapping[str, Mapping[str, tuple[float, float]]], pair: tuple[str, str]) -> np.ndarray:
    """Second − first of two models on each of the prompts of both, by labels and by judge: shape (n, 2)."""
    first, second = (values[name] for name in pair)
    rows = [np.subtract(second[prompt], first[prompt]) for prompt in first if prompt in second]
    return np.array(rows).reshape(-1, 2)


def _difference(models: tuple[str, str], differences: np.ndarray, reach: float) -> ModelDifference:
    labels, judge = (mean(list((differences[:, column] + 1) / 2)) for column in (0, 1))
    by_labels, low, high = (2 * float(end) - 1 for end in (labels.known, labels.low, labels.high))  # type: ignore[arg-type]
    by_judge, judge_low, judge_high = (2 * float(end) - 1 for end in (judge.known, judge.low, judge.high))  # type: ignore[arg-type]
    widened = widen(by_judge, (judge_low, judge_high), reach)
    return ModelDifference(
        models=models,
        n=len(differences),
        labels=by_labels,
        labels_low=low,
        labels_high=high,
        judge=by_judge,
        judge_low=widened[0],
        judge_high=widened[1],
        decided=not widened[0] <= 0 <= widened[1],
    )
