"""All judges by name, and the one that a run is configured with."""

from __future__ import annotations

from importlib import import_module

from bdpo.config import Config
from bdpo.config.evaluate import JUDGE_NAMES
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


def judge_fingerprint(config: Config) -> Fingerprint:
    """What decides about a verdict besides the response. Where the endpoint is does not."""
    kind = judge_kind(config)
    return {"evaluate.judge": kind.name, **kind.fingerprint(config)}
