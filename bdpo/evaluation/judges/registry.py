"""All judges by name, and the one that a run is configured with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module

from bdpo.config import Config
from bdpo.config.judges import JUDGE_NAMES
from bdpo.errors import UserError
from bdpo.evaluation.judges.base import Judge, JudgeKind
from bdpo.storage.manifests import Fingerprint, read_manifest
from bdpo.storage.paths import storage_path

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


def judge_note(config: Config) -> JudgeNote:
    """The configured judge with its own error: that of `evaluate.agreement`, else the one it declares.

    Raises:
        UserError: the file is no agreement, or did not measure this very judge in comparing models.
    """
    kind, file = judge_kind(config), config.evaluate.agreement
    reach = {str(rubric): half for rubric, half in kind.reach(config).items()}
    return JudgeNote(kind.name, reach if file is None else reach | _measured_reach(config, file))


def _measured_reach(config: Config, file: str) -> dict[str, float]:
    """What an agreement.json says of the judge whose fingerprint is that of this config."""
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
    bias = found["judges"][name]["bias"]
    if bias is None:
        raise UserError(f"{where}: measured {name} on one model, so its error between two is not known")
    return {found["rubric"]: bias["reach"]}


def judge_label(config: Config) -> str:
    """The configured judge as its numbers name it."""
    return JudgeNote(config.evaluate.judge.name).label


def judge_fingerprint(config: Config) -> Fingerprint:
    """What decides about a verdict besides the response. Where the endpoint is does not."""
    kind = judge_kind(config)
    return {"evaluate.judge": kind.name, **kind.fingerprint(config)}
