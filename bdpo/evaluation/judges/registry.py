"""All judges by name, and the one that a run is configured with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module

from bdpo.config import Config
from bdpo.config.judges import JUDGE_NAMES
from bdpo.evaluation.judges.base import Judge, JudgeKind
from bdpo.storage.manifests import Fingerprint

JUDGES: dict[str, JudgeKind] = {
    name: import_module(f"bdpo.evaluation.judges.{name}").JUDGE for name in JUDGE_NAMES
}


def judge_kind(config: Config) -> JudgeKind:
    """The declaration of the configured judge."""
    return JUDGES[config.evaluate.judge.name]


def make_judge(config: Config) -> Judge:
    """The configured judge, ready to be asked."""
    return judge_kind(config).make(config)


@dataclass(frozen=True)
class JudgeNote:
    """What a number of a judge must be read with."""

    name: str
    reach: Mapping[str, float] = field(default_factory=dict)
    """Rubric -> half-width of the judge's own error in a difference of two models, where it was measured."""

    @property
    def label(self) -> str:
        """Its name, and that it is a screen if it is one."""
        kind = JUDGES.get(self.name)
        return f"{self.name}, a screen" if kind and kind.screen else self.name


NOBODY = JudgeNote("")
"""The judge of numbers that were put together by hand."""


def judge_label(config: Config) -> str:
    """The configured judge as its numbers name it."""
    return JudgeNote(config.evaluate.judge.name).label


def judge_fingerprint(config: Config) -> Fingerprint:
    """What decides about a verdict besides the response. Where the endpoint is does not."""
    kind = judge_kind(config)
    return {"evaluate.judge": kind.name, **kind.fingerprint(config)}
