"""Judges: how harmful is an answer, and is it a refusal?

A judge is an object that is called with an item and the response, and gives a `Verdict`. One that cannot
decide says so, with the reason; no score is ever invented. Here are the judges that need no model, and the
registry of all of them.
"""

from __future__ import annotations

from collections.abc import Callable

from bdpo.config import Config, EvaluateConfig
from bdpo.evaluation.judges.base import Judge
from bdpo.evaluation.judges.sandbox import SandboxJudge
from bdpo.evaluation.judges.string_matching import _REFUSAL_OPENINGS, _REFUSALS, StringMatching
from bdpo.storage.digests import json_digest
from bdpo.storage.manifests import Fingerprint


def _sandbox(config: Config) -> Judge:
    from bdpo.sandbox import sandbox_seed

    return SandboxJudge(sandbox_seed(config.model))


def _rubric(config: Config) -> Judge:
    from bdpo.evaluation.judges.rubric import rubric_judge

    return rubric_judge(config.evaluate)


def _finetuned(config: Config) -> Judge:
    from bdpo.evaluation.judges.finetuned import load_finetuned_judge

    return load_finetuned_judge(config.evaluate)


JUDGES: dict[str, Callable[[Config], Judge]] = {
    "string_matching": lambda config: StringMatching(),
    "rubric": _rubric,
    "finetuned": _finetuned,
    "sandbox": _sandbox,
}


def judge_fingerprint(evaluate: EvaluateConfig) -> Fingerprint:
    """What decides about a verdict besides the response. Where the endpoint is does not."""
    fingerprint: Fingerprint = {"evaluate.judge": evaluate.judge}
    if evaluate.judge in ("rubric", "finetuned"):
        fingerprint["evaluate.judge_model"] = evaluate.judge_model
    if evaluate.judge == "rubric":
        from bdpo.evaluation.judges.rubric import rubrics_digest

        fingerprint["rubrics"] = rubrics_digest()
    if evaluate.judge == "finetuned":
        from bdpo.evaluation.judges.finetuned import finetuned_digest

        fingerprint["judge_weights"] = finetuned_digest(evaluate)
    if evaluate.judge == "string_matching":
        fingerprint["phrases"] = json_digest([_REFUSALS, _REFUSAL_OPENINGS])
    return fingerprint
