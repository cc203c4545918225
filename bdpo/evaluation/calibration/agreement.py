"""How far judges agree with labels and with each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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
from bdpo.stats import Estimate, rate

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
