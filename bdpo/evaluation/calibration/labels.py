"""Labelled answers: what the words and flags in a column of labels mean.

A label answers one of two questions, which are the rubrics of judges: was the request refused (`refusal`), or
was the answer harmful (`harm`)? Words name the answer (`full_refusal`, `unsafe`); a flag (true, 0, yes) has
the meaning of its column's name (`unsafe`, `jailbroken`, `refused`), or that which the user states.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bdpo.errors import UserError, escaped
from bdpo.evaluation.judges.base import RubricName

LabelClass = Literal["refused", "partial", "complied", "safe", "unsafe"]
"""What a label calls an answer."""

RUBRIC_OF: dict[LabelClass, RubricName] = {
    "refused": "refusal",
    "partial": "refusal",
    "complied": "refusal",
    "safe": "harm",
    "unsafe": "harm",
}

OPPOSITE: dict[LabelClass, LabelClass] = {
    "refused": "complied",
    "complied": "refused",
    "safe": "unsafe",
    "unsafe": "safe",
}
"""Meaning of a flag that is true -> that of the same flag where it is false."""

SAFE_CLASSES: frozenset[LabelClass] = frozenset({"refused", "safe"})
"""The classes that rates count: the share of refused, or of safe, answers. A partial refusal is none, as in
XSTest's `unsafe_refusal`."""

_WORDS: dict[LabelClass, tuple[str, ...]] = {
    "refused": ("full_refusal", "refusal", "refused", "refuse", "refuses", "refusing"),
    "partial": ("partial_refusal", "partial", "partial_compliance"),
    "complied": ("full_compliance", "compliance", "complied", "comply", "complies", "complying", "answered"),
    "safe": ("safe", "harmless", "unharmful", "not_harmful", "not_jailbroken", "not_unsafe"),
    "unsafe": ("unsafe", "harmful", "jailbroken", "not_safe"),
}

_CLASS_OF = {word: name for name, words in _WORDS.items() for word in words}

_FLAGS = dict.fromkeys(("true", "yes", "1", "1.0"), True) | dict.fromkeys(("false", "no", "0", "0.0"), False)

_FLAG_COLUMNS: dict[LabelClass, frozenset[str]] = {
    "unsafe": frozenset({"unsafe", "harmful", "harm", "jailbroken"}),
    "safe": frozenset({"safe", "harmless"}),
    "refused": frozenset({"refused", "refusal", "refuses"}),
    "complied": frozenset({"complied", "compliance", "complies"}),
}

_BESIDE_IT = frozenset(
    {"is", "was", "response", "answer", "completion", "output", "reply", "label", "labels", "final", "human",
     "gold", "judge", "majority", "vote", "by", "gpt", "llama", "guard", "rules"}
)  # fmt: skip
"""What a column's name may hold besides: whose answer, and who labelled. Any other word may turn the meaning
round (`jailbreak_blocked`) or be about the prompt (`prompt_harmful`)."""


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer of a model to a request, and its label. Texts are left out of the repr."""

    model: str
    request: str = field(repr=False)
    response: str = field(repr=False)
    label: LabelClass
    parts: frozenset[str] = frozenset()
    """The parts of the answers that it belongs to: on each the error of a judge is measured by itself."""

    @property
    def safe(self) -> bool:
        """Whether the label is of those that rates count, see `SAFE_CLASSES`."""
        return self.label in SAFE_CLASSES


@dataclass(frozen=True)
class LabelScheme:
    """What each label of a column means."""

    rubric: RubricName
    classes: dict[str, LabelClass]
    """Label as it is written -> its class."""

    def describe(self) -> str:
        """One line: `1_full_compliance = complied, 2_full_refusal = refused`."""
        return ", ".join(f"{escaped(label)} = {name}" for label, name in sorted(self.classes.items()))


def label_scheme(column: str, labels: Sequence[tuple[str, Any]], true: LabelClass | None) -> LabelScheme:
    """What the labels of a column mean.

    Args:
        column: its name, which gives flags their meaning.
        labels: (file and row, label) of every labelled answer.
        true: what a flag that is true means, where the name of the column does not show it.

    Raises:
        UserError: naming file and row of the first label that is unknown, or that answers another question
            than the labels before it; or the column, if it holds flags whose meaning is unknown.
    """
    classes: dict[str, LabelClass] = {}
    for where, label in labels:
        text = label_text(label)
        if text not in classes:
            classes[text] = _class_of(column, where, text, true)
            rubrics = {RUBRIC_OF[name] for name in classes.values()}
            if len(rubrics) > 1:
                raise UserError(
                    f"{where}, column {column}: label {_shown(text)} is about harm or refusal, and labels "
                    "before it are about the other: give one --label a question"
                )
    [rubric] = {RUBRIC_OF[name] for name in classes.values()}
    return LabelScheme(rubric, classes)


def label_text(label: Any) -> str:
    """A label as text: booleans and numbers as JSON writes them."""
    return str(label).lower() if isinstance(label, bool) else str(label).strip()


def _class_of(column: str, where: str, label: str, true: LabelClass | None) -> LabelClass:
    if label.lower() in _FLAGS:
        meaning = true or _flag_meaning(column)
        if meaning is None:
            raise UserError(
                f"{where}, column {column}: label {_shown(label)} is a flag, and the name of the column does "
                f"not say of what; give --true {'|'.join(OPPOSITE)}: what a flag that is set means"
            )
        return meaning if _FLAGS[label.lower()] else OPPOSITE[meaning]
    # XSTest numbers its classes: 1_full_compliance
    word = re.sub(r"[\s-]+", "_", re.sub(r"^\d+[\s_.:-]+", "", label.strip().lower()))
    if word not in _CLASS_OF:
        raise UserError(
            f"{where}, column {column}: unknown label {_shown(label)}; known are true, false, 1, 0, "
            f"{', '.join(_CLASS_OF)}"
        )
    return _CLASS_OF[word]


def _flag_meaning(column: str) -> LabelClass | None:
    """What a flag in a column of this name means; None where the name shows no meaning, two, or more."""
    words = set(re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column).lower()))
    found = [meaning for meaning, names in _FLAG_COLUMNS.items() if names & words]
    known = _BESIDE_IT.union(*_FLAG_COLUMNS.values())
    return found[0] if len(found) == 1 and words <= known else None


def _shown(label: str) -> str:
    """A label in a message: short, for a wrong column may hold complete answers."""
    return repr(escaped(label)) if len(label) <= 24 else f"of {len(label)} characters"
