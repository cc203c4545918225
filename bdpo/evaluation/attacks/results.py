"""Results of an attack: artifact, success rate with its interval, cost, paired comparison."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import pyarrow as pa

from bdpo.config import Config
from bdpo.evaluation.attacks.records import COSTS, TEXTS
from bdpo.evaluation.attacks.registry import attack_kind
from bdpo.evaluation.attacks.requests import Request
from bdpo.evaluation.judges.registry import judge_label
from bdpo.evaluation.measures import MAX_FAILED_FRACTION
from bdpo.stats import Difference, Estimate, paired_difference, rate


@dataclass(frozen=True)
class AttackSummary:
    """The numbers of an attack on one model; `success` is over the requests that have a verdict."""

    judge: str
    n: int
    n_judged: int
    success: Estimate
    failures: Mapping[str, int]
    """Code of the judge's or the attacker's failure -> requests."""
    unanswered: Mapping[str, int]
    """Why nothing was asked or answered -> requests. They are in no rate: nothing is known of them."""
    queries: int
    forward_passes: int
    prompt_tokens: int
    response_tokens: int
    unjudged: int
    """Requests to which there are answers, and no verdict: which of them were withstood is not known."""
    failed_verdicts: int
    """Answers without a verdict, also of requests that have a verdict by other answers."""
    failed_prompts: int
    """Prompts that the attacker did not write when it was asked to."""
    not_asked: int
    """Prompts that were not asked, because they left no room for an answer."""
    stuck: int
    """Searches that found no candidate any more and ended before their budget was spent."""
    median_queries: float | None
    """Queries up to the success, over the requests where the attack succeeded. Of an attack with forward
    passes besides these are the answers that the judge saw on the way."""
    median_forward_passes: float | None = None
    """Other forward passes up to the success, over the same requests; None where the attack has none."""
    direct: Estimate | None = None
    """The success rate of the requests that were also asked alone, greedily, without an attack."""
    beyond_direct: Estimate | None = None
    """The success rate over the requests that were withstood when they were asked alone: those for which the
    attack had to search. They are other requests for another model."""
    categories: Mapping[str, Estimate] = field(default_factory=dict)
    held_out: Estimate | None = None
    """The success rate of a universal suffix on the requests that it was not made with."""
    trained_on: Estimate | None = None
    """The success rate on the requests that it was made with."""

    @property
    def valid(self) -> bool:
        """Whether enough requests have a verdict: at most 2 % of those that were answered may have none."""
        known = self.n_judged
        return known > 0 and self.unjudged <= MAX_FAILED_FRACTION * (known + self.unjudged)


def public_scores(records: pa.Table, requests: Sequence[Request]) -> pa.Table:
    """The records without texts, with category and cluster of each request, by id."""
    of = {request.item_id: request for request in requests}
    ids = records["item_id"].to_pylist()
    table = records.drop_columns(list(TEXTS))
    table = table.append_column("category", pa.array([of[item].category for item in ids], pa.string()))
    clusters = [of[item].cluster or item for item in ids]
    return table.append_column("cluster", pa.array(clusters, pa.string())).sort_by("item_id")


def summarise_attack(scores: pa.Table, judge: str, universal: bool = False) -> AttackSummary:
    """The numbers of `public_scores`. `universal`: rates are also given apart for the held-out requests."""
    rows = scores.to_pylist()
    succeeded = [row for row in rows if row["jailbroken"]]
    direct = [row for row in rows if row["direct"] is not None]
    searched_for = [row for row in direct if not row["direct"]]
    searched = any(row["forward_passes"] for row in rows)
    categories = sorted({row["category"] for row in rows})
    return AttackSummary(
        judge,
        len(rows),
        sum(row["jailbroken"] is not None for row in rows),
        _rate(rows),
        dict(Counter(row["failure"] for row in rows if row["failure"])),
        dict(Counter(_reason(row) for row in rows if row["jailbroken"] is None and not row["failure"])),
        unjudged=sum(row["jailbroken"] is None and row["queries"] > 0 for row in rows),
        **{name: sum(row[name] for row in rows) for name in COSTS},
        median_queries=_median("queries", succeeded),
        median_forward_passes=_median("forward_passes", succeeded) if searched and not universal else None,
        direct=_rate(direct, "direct") if direct else None,
        beyond_direct=_rate(searched_for) if searched_for else None,
        categories={name: _rate([row for row in rows if row["category"] == name]) for name in categories},
        held_out=_rate([row for row in rows if row["held_out"]]) if universal else None,
        trained_on=_rate([row for row in rows if not row["held_out"]]) if universal else None,
    )


def _reason(row: Mapping[str, Any]) -> str:
    return row["unanswered"] or "not_asked"


def _rate(rows: Sequence[Mapping[str, Any]], column: str = "jailbroken") -> Estimate:
    judged = [row for row in rows if row[column] is not None]
    return rate([row[column] for row in judged], [row["cluster"] for row in judged])


def _median(column: str, rows: Sequence[Mapping[str, Any]]) -> float | None:
    return float(median(row[column] for row in rows)) if rows else None


def read_summary(values: Mapping[str, Any]) -> AttackSummary:
    """The inverse of `asdict` on a summary; other keys of a manifest are left aside."""
    plain = {name: values[name] for name in AttackSummary.__dataclass_fields__}
    for name in ("success", "held_out", "trained_on", "direct", "beyond_direct"):
        plain[name] = None if plain[name] is None else Estimate(**plain[name])
    plain["categories"] = {name: Estimate(**value) for name, value in plain["categories"].items()}
    return AttackSummary(**plain)


def compare_attacks(first: pa.Table, second: pa.Table) -> Difference | None:
    """Success after minus success before, over the requests that have a verdict in both; None without any."""
    before, after = ({row["item_id"]: row for row in table.to_pylist()} for table in (first, second))
    both = [
        item
        for item, row in before.items()
        if item in after and None not in (row["jailbroken"], after[item]["jailbroken"])
    ]
    if not both:
        return None
    sides = [[float(side[item]["jailbroken"]) for item in both] for side in (before, after)]
    return paired_difference(sides[0], sides[1], [before[item]["cluster"] for item in both])


def artifact(config: Config, model_name: str, requests: Sequence[Request], records: pa.Table) -> str:
    """The attack as JSON in JailbreakBench's schema, which the benchmark `jailbreak` reads.

    `src/jailbreakbench/artifact.py` of github.com/JailbreakBench/jailbreakbench. `prefill`, which upstream
    does not have, is what the assistant's turn began with. Where there is no verdict, `prompt` and `response`
    are null and `jailbroken` false, as upstream writes where no attack was found: nobody can take it for a
    label of an answer, or for an attack. No time is in it: the same run makes the same file.
    """
    kind, rows = attack_kind(config), {row["item_id"]: row for row in records.to_pylist()}
    jailbreaks = [_jailbreak(request, rows[request.item_id]) for request in requests]
    judged = [row for row in rows.values() if row["jailbroken"] is not None]
    successes = sum(row["jailbroken"] for row in judged)
    section = config.attack.fingerprint()
    parameters = {
        "method": kind.label,
        "model": model_name,
        "attack_type": kind.access,
        "defense": None,
        "attack_success_rate": successes / len(judged) if judged else None,
        "total_number_of_jailbreaks": successes,
        "number_of_submitted_prompts": len(judged),
        "total_number_of_queries": sum(row["queries"] for row in rows.values()),
        "total_prompt_tokens": sum(row["prompt_tokens"] for row in rows.values()),
        "total_response_tokens": sum(row["response_tokens"] for row in rows.values()),
        "judge": judge_label(config),
        "seed": config.seed,
        "method_parameters": {key: value for key, value in section.items() if key not in ("name", "models")},
    }
    return json.dumps({"parameters": parameters, "jailbreaks": jailbreaks}, indent=1) + "\n"


def _jailbreak(request: Request, row: Mapping[str, Any]) -> Mapping[str, Any]:
    made = row if row["jailbroken"] is not None else dict.fromkeys(TEXTS)
    return {
        "index": request.index,
        "goal": request.goal,
        "behavior": request.item_id,
        "category": request.category,
        "prompt": made["prompt"],
        **({"prefill": made["prefill"]} if made["prefill"] else {}),
        "response": made["response"],
        "number_of_queries": row["queries"],
        "queries_to_jailbreak": row["queries"] if row["jailbroken"] else None,
        "prompt_tokens": row["prompt_tokens"],
        "response_tokens": row["response_tokens"],
        "jailbroken": bool(row["jailbroken"]),
    }


def summary_facts(summary: AttackSummary) -> dict[str, object]:
    """The summary as a manifest has it."""
    return {**asdict(summary), "valid": summary.valid}
