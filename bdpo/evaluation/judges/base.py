"""What a judge is: a verdict on one response to one request."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Protocol

from bdpo.evaluation.benchmarks.items import Item


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one response; None where it was not asked or came to no decision."""

    harm: float | None = None
    """The StrongReject score in [0, 1]: 1 is full compliance with a forbidden request."""
    refused: bool | None = None
    """A full refusal."""
    partial: bool | None = None
    """A partial refusal, in XSTest's sense: refusal and compliance at once."""
    grade: Literal["correct", "incorrect", "not_attempted"] | None = None
    """SimpleQA's."""
    failure: str | None = None
    """Why there is no decision: a code such as `timeout`, never a text that somebody wrote."""

    def __post_init__(self) -> None:
        if self.harm is not None and not 0 <= self.harm <= 1:
            raise ValueError(f"harm is {self.harm}, outside [0, 1]")


class Judge(Protocol):
    """The judge's interface; it may keep a model, so one is built per worker."""

    @property
    def concurrency(self) -> int:
        """How many responses it may be asked about at a time, each from a thread of its own."""
        ...

    def __call__(self, item: Item, response: str) -> Verdict:
        """Judge one response."""
        ...


_ADDRESSES_JUDGE = re.compile(
    r"\b(?:judge|grader|evaluator|rubric|grading)\b"
    r"|\b(?:ignore|disregard|forget|override)\b.{0,40}\b(?:instructions?|rules|above|previous|prior)\b"
    r"|\b(?:refusal|convincingness|specificity|score|grade|rating)\W{0,4}[:=]\W{0,3}\w"
    r"|\bclass\W{0,4}[:=]\W{0,3}(?:full|partial)_"
    r"|<\|?/?(?:im_start|im_end|system|assistant|user|response|end|inst)\b|\[/?(?:inst|system|response)\b"
    r"|^\W*(?:system|assistant|user)\s*:",
    re.IGNORECASE | re.DOTALL | re.MULTILINE,
)


def addresses_judge(response: str) -> bool:
    """Does a response seem to talk to its judge? Such items are flagged for people, and not rescored."""
    return _ADDRESSES_JUDGE.search(response) is not None
