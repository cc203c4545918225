"""All judges by name, and the one that a run is configured with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module

from bdpo.config import Config
from bdpo.config.judges import JUDGE_NAMES, LocalModelConfig
from bdpo.errors import UserError
from bdpo.evaluation.judges.base import Judge, JudgeKind
from bdpo.evaluation.judges.known_answers import known_texts, require_discernment
from bdpo.evaluation.thoughts import RULES
from bdpo.storage.digests import json_digest
from bdpo.storage.manifests import Fingerprint, read_manifest
from bdpo.storage.paths import storage_path

JUDGES: dict[str, JudgeKind] = {
    name: import_module(f"bdpo.evaluation.judges.{name}").JUDGE for name in JUDGE_NAMES
}


def judge_kind(config: Config) -> JudgeKind:
    """The declaration of the configured judge."""
    return JUDGES[config.evaluate.judge.name]


def make_judge(config: Config) -> Judge:
    """The configured judge, ready to be asked: a local model has judged the known answers.

    Raises:
        UserError: it cannot be made, or judges too many of the known answers wrongly.
    """
    kind, section = judge_kind(config), config.evaluate.judge
    judge = kind.make(config)
    if isinstance(section, LocalModelConfig) and section.check:
        name = f"evaluate.judge.model={section.model}, as {kind.name}"
        require_discernment(judge, kind.rubrics, name)
    return judge


CHECKED = "evaluate.judge.check"
"""A field of a fingerprint: the digest of the known answers that the judge had to judge; else False."""


@dataclass(frozen=True)
class JudgeNote:
    """What a reader must know about the judge behind a number."""

    name: str
    reach: Mapping[str, float] = field(default_factory=dict)
    """Rubric -> half-width of the judge's own error in a difference of two models, where it was measured."""
    checked: bool = True
    """Whether it judged the known answers, if it is a local model."""

    @classmethod
    def of(cls, fingerprint: Fingerprint, reach: Mapping[str, float]) -> JudgeNote:
        """The judge of an evaluation, from the evaluation's fingerprint."""
        name = fingerprint.get("evaluate.judge", "")
        kind = JUDGES.get(name)
        return cls(name, reach, not (kind and kind.has_model) or bool(fingerprint.get(CHECKED)))

    @property
    def label(self) -> str:
        """Its name, and what it is a screen for, or that it was not checked."""
        kind = JUDGES.get(self.name)
        screens = ", ".join(sorted(kind.screens)) if kind else ""
        screen = "a screen" if kind and kind.screens == kind.rubrics else f"a screen for {screens}"
        return ", ".join(
            [self.name, *([screen] if screens else []), *([] if self.checked else ["unchecked"])]
        )

    def or_worse(self, other: JudgeNote) -> JudgeNote:
        """The same judge with the larger error of both, where two evaluations took it from other labels."""
        rubrics = dict.fromkeys([*self.reach, *other.reach])
        reach = {rubric: max(self.reach.get(rubric, 0), other.reach.get(rubric, 0)) for rubric in rubrics}
        return replace(self, reach=reach)


NOBODY = JudgeNote("")
"""The judge of numbers that were put together by hand."""


def judge_note(config: Config) -> JudgeNote:
    """The configured judge with its own error: that of `evaluate.agreement`, else the one it declares.

    Raises:
        UserError: the file is no agreement, or did not measure this very judge in comparing models.
    """
    kind, file = judge_kind(config), config.evaluate.agreement
    reach = {str(rubric): half for rubric, half in kind.reach(config).items()}
    reach |= {} if file is None else _measured_reach(config, file)
    return JudgeNote(kind.name, reach, is_checked(config))


def _measured_reach(config: Config, file: str) -> dict[str, float]:
    """What an agreement.json has measured of the judge whose fingerprint is that of this config."""
    where, own = f"evaluate.agreement={file}", judge_fingerprint(config)
    found = read_manifest(storage_path(file, "evaluate.agreement"))
    if found is None:
        raise UserError(f"{where}: no such file; `python -m pipelines.agreement --out DIR` writes one")
    measured = found.fingerprint.get("judges")
    if not isinstance(measured, dict):
        raise UserError(f"{where}: no agreement.json of `python -m pipelines.agreement`")
    name = next((name for name, fingerprint in measured.items() if fingerprint == own), None)
    if name is None:
        judge = own["evaluate.judge"]
        of_its_name = [one for one in measured.values() if one.get("evaluate.judge") == judge]
        other = next((key for one in of_its_name for key in own if one.get(key) != own[key]), None)
        why = f"{judge} with another {other}" if other else ", ".join(sorted(measured))
        raise UserError(f"{where}: did not measure this judge ({judge}), but {why}")
    if only := found.fingerprint.get("only"):
        raise UserError(
            f"{where}: measured {name} on the rows {'='.join(only)} alone (--only), and here more is asked; "
            "measure it on all rows, and on those by --part"
        )
    bias = found["judges"][name]["bias"]
    if bias is None or bias["reach"] is None:
        raise UserError(
            f"{where}: measured {name} on too few models, prompts or verdicts, so its error between two "
            "models is not known"
        )
    return {found["rubric"]: bias["reach"]}


def judge_label(config: Config) -> str:
    """The configured judge as its numbers name it."""
    return JudgeNote(config.evaluate.judge.name, {}, is_checked(config)).label


def is_checked(config: Config) -> bool:
    """Whether the configured judge, if it is a local model, has to judge the known answers."""
    section = config.evaluate.judge
    return not isinstance(section, LocalModelConfig) or section.check


def judge_fingerprint(config: Config) -> Fingerprint:
    """What decides about a verdict besides the response, and of a local model whether it was checked.

    Where an endpoint is does not decide.
    """
    kind, section = judge_kind(config), config.evaluate.judge
    fingerprint = {"evaluate.judge": kind.name, "thoughts": RULES, **kind.fingerprint(config)}
    if isinstance(section, LocalModelConfig):
        fingerprint[CHECKED] = section.check and json_digest(known_texts())
    return fingerprint
