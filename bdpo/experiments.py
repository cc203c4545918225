"""The paper's experiments as arms: what each changes of a run's config, and what its results say.

An arm is trained once for each seed, in a folder of its own, on the pairs and scores of the run:

    <run_dir>/experiments/<name>/<arm>/seed-0/     a run folder: config.yaml, metrics.jsonl, model/, eval/
    <run_dir>/experiments/<name>/results.csv       a row for each arm and measure, with its interval
    <run_dir>/experiments/<name>/displacement.csv  of `displacement`: what became of the pairs' log-probs
    <run_dir>/experiments/<name>/*.png             the figures
    <run_dir>/experiments/<name>/report.html       all of it on one page
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from bdpo.config import Config
from bdpo.config.method import default_beta
from bdpo.evaluation.compare import item_values, paired_difference
from bdpo.evaluation.reading import Evaluation
from bdpo.evaluation.summary import mean
from bdpo.runs import RunDir
from bdpo.search import Params, trial_config

BASE = "base"
RESULT_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("arm", "benchmark", "measure")),
        *((name, pa.int64()) for name in ("n", "dropped", "seeds")),
        *((name, pa.float64()) for name in ("value", "low", "high", "seed_low", "seed_high")),
        ("paired_n", pa.int64()),
        *((name, pa.float64()) for name in ("first", "second", "difference")),
        *((name, pa.float64()) for name in ("difference_low", "difference_high", "p")),
    ]
)


@dataclass(frozen=True)
class Arm:
    """One line of a table: its name, and dotted keys of the config with the values that they take."""

    name: str
    params: Params = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """What is compared with what. The first arm is the one that all others are tested against."""

    title: str
    question: str
    arms: tuple[Arm, ...]
    axis: str | None = None  # the key that the arms vary, where its values make a curve
    displaced: bool = False  # whether the trained models say what became of the pairs' log-probs


def experiment(name: str, config: Config) -> Experiment:
    """The experiment of this name for a run; see `EXPERIMENTS`."""
    return EXPERIMENTS[name](config)


def _imbalance(config: Config) -> Experiment:
    return Experiment(
        "Imbalanced understanding (Figure 2)",
        "Does the reference model understand one response of a pair better than the other?",
        (),
    )


def _balanced_subset(config: Config) -> Experiment:
    select = config.data.select.model_dump() if config.data.select else {}

    def half(name: str, *bounds: float) -> Arm:
        return Arm(name, _method("dpo", config) | {"data.select": select | {"mi_difference": list(bounds)}})

    return Experiment(
        "Balanced and imbalanced pairs (Figures 3 and 4)",
        "Does plain DPO do better on the half of the pairs whose responses are understood alike?",
        (half("balanced", 0.0, 0.5), half("imbalanced", 0.5, 1.0)),
    )


def _methods(config: Config) -> Experiment:
    names = ("bdpo", "dpo", "cpo", "simpo", "safedpo")
    return Experiment(
        "Methods (Table 1)",
        "Is B-DPO safer than the other methods, and does it stay as useful?",
        tuple(Arm(name, _method(name, config)) for name in names),
    )


def _ablation(config: Config) -> Experiment:
    bdpo = _method("bdpo", config)
    if config.method.balance == "none":
        bdpo |= {"method.balance": "ratio"}
    other = {"ratio": "softmax", "softmax": "ratio"}.get(config.method.balance, "ratio")
    context = {"empty_turn": "bos", "bos": "empty_turn"}[config.score.unconditional]
    return Experiment(
        "What B-DPO is made of (Table 2)",
        "Which part does it: the balance weights (BW), the scaling factor (SF), the rule, the context?",
        (
            Arm("bdpo", bdpo),
            Arm("dpo", _method("dpo", config)),
            Arm("dpo_bw", _method("dpo_bw", config)),
            Arm("dpo_sf", _method("dpo_sf", config)),
            Arm(f"bdpo-{other}", bdpo | {"method.balance": other}),
            Arm(f"bdpo-{context}", bdpo | {"score.unconditional": context}),
        ),
    )


def _displacement(config: Config) -> Experiment:
    return Experiment(
        "Likelihood displacement",
        "Which preferred responses become less likely in training, and could the reference model tell?",
        tuple(Arm(name, _method(name, config)) for name in ("dpo", "bdpo")),
        displaced=True,
    )


def _curve(name: str, title: str, question: str) -> Callable[[Config], Experiment]:
    """DPO first, then B-DPO at every value that section `experiment` has of a key of the method."""
    key = f"method.{name}"

    def curve(config: Config) -> Experiment:
        bdpo, values = _method("bdpo", config), getattr(config.experiment, f"{name}s")
        arms = (Arm(f"{name}-{value}", bdpo | {key: value}) for value in values)
        return Experiment(title, question, (Arm("dpo", _method("dpo", config)), *arms), key)

    return curve


EXPERIMENTS = {
    "imbalance": _imbalance,
    "balanced-subset": _balanced_subset,
    "methods": _methods,
    "ablation": _ablation,
    "alpha": _curve(
        "alpha", "The scaling factor α (Figure 5)", "How much does the total of the two weights matter?"
    ),
    "beta": _curve("beta", "The strength β of the reference", "How much does β matter?"),
    "displacement": _displacement,
}


def _method(name: str, config: Config) -> Params:
    """A method with the run's settings, and with the β of its own where the run's is for another kind."""
    beta = (
        config.method.beta if default_beta(name) == default_beta(config.method.name) else default_beta(name)
    )
    return {"method.name": name, "method.beta": beta}


def arm_run(config: Config, run: RunDir, name: str, arm: Arm, seed: int) -> tuple[Config, RunDir]:
    """The config and the run folder of an arm at a seed.

    The pairs are those of the run; so are the scores, unless the arm wants another unconditional context.
    """
    folder = run.part("experiments", name, arm.name, f"seed-{seed}")
    settings = trial_config(config, arm.params, str(folder.root), f"{name}, arm {arm.name}")
    context = settings.score.unconditional
    if context != config.score.unconditional:
        folder.scores = run.root / "experiments" / name / f"context-{context}" / "scores"
    return settings.model_copy(update={"seed": seed}), folder


def rescored(config: Config, run: RunDir) -> tuple[Config, RunDir]:
    """The config and the folder under which an arm's trained model scores the pairs of the run."""
    folder = run.part()
    folder.scores = run.root / "rescored"
    model = config.model.model_copy(update={"name_or_path": str(run.model), "revision": None})
    return config.model_copy(update={"model": model}), folder


def summarise_arms(evaluations: dict[str, list[Evaluation]]) -> pa.Table:
    """A row for each arm, benchmark and measure, from the evaluations of its models, one of each seed.

    `value` is the mean over prompts and seeds; `low` and `high` its 95 % interval, a bootstrap over prompts;
    `seed_low` and `seed_high` the lowest and highest value of a single seed. Prompts without a verdict at one
    of the seeds count at none and are `dropped`. The first arm is the reference: `difference` (`second` −
    `first`), its interval and `p` compare with it over the `paired_n` prompts of both, each prompt's mean
    over the seeds: how much other seeds would change is not in them. Of capability benchmarks only sums are
    known: the mean of the seeds and of their bounds, without a test.
    """
    values = {arm: [item_values(seed.scores) for seed in seeds] for arm, seeds in evaluations.items()}
    reference = next(iter(values))
    rows = []
    for arm, seeds in values.items():
        for key in dict.fromkeys(key for seed in seeds for key in seed):
            means, dropped = item_means([seed.get(key, {}) for seed in seeds])
            if not means:
                continue
            each = [float(np.mean([seed[key][item] for item in means])) for seed in seeds]
            row = _row(arm, key, len(means), each) | {"dropped": dropped} | mean(list(means.values()))
            first = [seed.get(key, {}) for seed in values[reference]]
            rows.append(row | ({} if arm == reference else _tested(item_means(first)[0], means)))
        rows += _capability(arm, [seed.summary.get("capability", {}) for seed in evaluations[arm]])
    return pa.Table.from_pylist(rows, schema=RESULT_SCHEMA)


def _capability(arm: str, seeds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for benchmark in seeds[0]:
        found = [seed.get(benchmark, {}).get("accuracy") for seed in seeds]
        if all(found):
            bounds = {end: float(np.mean([f[end] for f in found])) for end in ("value", "low", "high")}
            each = [f["value"] for f in found]
            rows.append(_row(arm, (benchmark, "accuracy"), found[0]["n"], each) | bounds)
    return rows


def _row(arm: str, key: tuple[str, str], n: int, each: Sequence[float]) -> dict[str, Any]:
    row = {"arm": arm, "benchmark": key[0], "measure": key[1], "n": n, "dropped": 0, "seeds": len(each)}
    return row | {"seed_low": min(each), "seed_high": max(each)}


def _tested(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, Any]:
    """How the second differs from the first on the prompts of both; nothing where there are none."""
    both = sorted(first.keys() & second.keys())
    if not both:
        return {}
    compared = paired_difference([first[item] for item in both], [second[item] for item in both])
    names = {"n": "paired_n", "low": "difference_low", "high": "difference_high"}
    return {names.get(key, key): value for key, value in compared.items() if key != "test"}


def item_means(seeds: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], int]:
    """(each item's mean over the seeds, of those with a value at every seed; how many have not)"""
    everywhere = set.intersection(*map(set, seeds))
    somewhere = set.union(*map(set, seeds))
    means = {item: float(np.mean([seed[item] for seed in seeds])) for item in sorted(everywhere)}
    return means, len(somewhere) - len(everywhere)
