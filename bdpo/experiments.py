"""The paper's experiments as arms: what each changes of a run's config, and what its results say.

An arm is trained once for each seed, on the pairs and scores of the run, in a folder that all experiments
share: it is called after what is trained, so that DPO is trained once and not once an experiment.

    <run_dir>/experiments/arms/<arm>/seed-0/       a run folder: config.yaml, metrics.jsonl, model/, eval/,
                                                   rescored/ of `displacement`
    <run_dir>/experiments/arms-search/, arms-held_out/, base-*/   the same on a part of the prompts
    <run_dir>/experiments/context-bos/             the pairs' scores with another unconditional context
    <run_dir>/experiments/<name>/experiment.json   what it was run with, see `Record`
    <run_dir>/experiments/<name>/results.csv       a row for each arm and measure, with its interval
    <run_dir>/experiments/<name>/differences.csv   how every two arms differ
    <run_dir>/experiments/<name>/rates.csv         of a search for learning rates: what each rate showed
    <run_dir>/experiments/<name>/displacement.csv  of `displacement`: what became of the pairs' log-probs
    <run_dir>/experiments/<name>/*.png             the figures
    <run_dir>/experiments/<name>/report.html       all of it on one page
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa

from bdpo.config import Config, parse_config
from bdpo.errors import UserError
from bdpo.evaluation.answers import evaluated_model
from bdpo.evaluation.compare import item_clusters, item_values, paired_difference
from bdpo.evaluation.reading import Evaluation
from bdpo.evaluation.summary import mean
from bdpo.runs import RunDir, read_manifest, write_manifest
from bdpo.search import Params, beta_of, trial_config, value_at
from bdpo.status import run_config
from bdpo.storage import StoragePath, matching

BASE = "base"
MAIN = ("safety", "compliance", "correct", "accuracy")
"""Measures that stand for their benchmark where there is room for one."""
_CONTEXT = "context-"
RECORD = "experiment.json"
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

DIFFERENCE_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("reference", "arm", "benchmark", "measure")),
        *(RESULT_SCHEMA.field(name) for name in RESULT_SCHEMA.names[RESULT_SCHEMA.names.index("paired_n") :]),
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


@dataclass(frozen=True)
class Record:
    """What an experiment was last run with, `<run_dir>/experiments/<name>/experiment.json`.

    `arms` are as they were trained, `trials` the arms of the search for their learning rates, `notes` what
    the reader of the results has to know.
    """

    config: Config
    arms: tuple[Arm, ...]
    trials: tuple[Arm, ...] = ()
    notes: tuple[str, ...] = ()

    def write(self, folder: StoragePath) -> None:
        """Keep it in the experiment's folder."""
        arms = {name: [asdict(arm) for arm in getattr(self, name)] for name in ("arms", "trials")}
        write_manifest(folder / RECORD, {}, config=self.config.model_dump(), **arms, notes=self.notes)

    @classmethod
    def read(cls, folder: StoragePath) -> Record:
        """Find it again.

        Raises:
            UserError: there is none.
        """
        file = folder / RECORD
        values = read_manifest(file)
        if values is None:
            command = f"python -m pipelines.experiment {folder.name}"
            raise UserError(f"{file}: not there; run `{command}` first")
        arms, trials = (tuple(Arm(**arm) for arm in values[name]) for name in ("arms", "trials"))
        return cls(parse_config(values["config"], str(file)), arms, trials, tuple(values["notes"]))


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
    if config.data.select:
        raise UserError("data.select: balanced-subset selects halves of all pairs; leave it out")

    def half(name: str, *bounds: float) -> Arm:
        return Arm(name, _method("dpo", config) | {"data.select": {"mi_difference": list(bounds)}})

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
    rule = "softmax" if config.method.balance == "softmax" else "ratio"
    other = {"ratio": "softmax", "softmax": "ratio"}[rule]
    bdpo, dpo_bw = (_method(name, config) | {"method.balance": rule} for name in ("bdpo", "dpo_bw"))
    context = {"empty_turn": "bos", "bos": "empty_turn"}[config.score.unconditional]
    return Experiment(
        "What B-DPO is made of (Table 2)",
        "Which part does it: the balance weights (BW), the scaling factor (SF), the rule, the context?",
        (
            Arm("bdpo", bdpo),
            Arm("dpo", _method("dpo", config)),
            Arm("dpo_bw", dpo_bw),
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
    return {"method.name": name, "method.beta": beta_of(config, name)}


def arm_run(config: Config, run: RunDir, arm: Arm, seed: int) -> tuple[Config, RunDir]:
    """The config and the run folder of an arm at a seed.

    The pairs are those of the run; so are the scores, unless the arm wants another unconditional context.
    """
    folder = run.part("experiments", _on_part("arms", config), arm_folder(config, arm), f"seed-{seed}")
    settings = trial_config(config, arm.params, str(folder.root), f"arm {arm.name}")
    if settings.score.unconditional != config.score.unconditional:
        folder.scores = context_scores(run, settings.score.unconditional)
    return settings.model_copy(update={"seed": seed}), folder


def arm_folder(config: Config, arm: Arm) -> str:
    """`bdpo-alpha-2.0`: the method, and whatever the arm has otherwise than the run would have it."""
    method: str = arm.params["method.name"]
    as_the_run = _method(method, config)
    changed = [
        f"{key.rpartition('.')[2]}-{json.dumps(value)}"
        for key, value in arm.params.items()
        if value != as_the_run.get(key, value_at(config, key))
    ]
    return re.sub(r"[^A-Za-z0-9._+]+", "-", "-".join([method, *changed])).replace("+", "").strip("-")


def base_run(config: Config, run: RunDir) -> RunDir:
    """Where the base model is evaluated: with the run, or apart where it is on a part of the prompts."""
    return run if config.evaluate.part == "all" else run.part("experiments", _on_part("base", config))


def _on_part(name: str, config: Config) -> str:
    """A folder's name; what is evaluated on a part of the prompts is kept apart."""
    part = config.evaluate.part
    return name if part == "all" else f"{name}-{part}"


def run_at(root: StoragePath) -> RunDir:
    """The run folder at a path: one of its own, or that of an arm or a trial, with the pairs of its run."""
    if (root / "data").is_dir():
        return RunDir(root)
    names, around = [root.name], root.parent
    while around.name not in ("", "experiments", "tune"):
        names.insert(0, around.name)
        around = around.parent
    if not (around.name and (around.parent / "config.yaml").is_file()):
        return RunDir(root)
    run = RunDir(around.parent)
    part = run.part(around.name, *names)
    context = run_config(part).score.unconditional
    if context != run_config(run).score.unconditional:
        part.scores = context_scores(run, context)
    return part


def context_scores(run: RunDir, context: str) -> StoragePath:
    """The scores of a run's pairs with another unconditional context than the run's."""
    return run.root / "experiments" / f"{_CONTEXT}{context}" / "scores"


def experiment_results(run: RunDir, name: str) -> list[StoragePath]:
    """All that an experiment makes, with what it shares with the run and with other experiments."""
    shared = [
        folder
        for experiments in (run.root / "experiments", run.private / "experiments")
        for kind in (_CONTEXT, "arms", "base")
        for folder in matching(experiments, f"{kind}*")
    ]
    own = run.part("experiments", name).root
    return [run.data, run.scores, run.eval("base"), run.responses("base"), *shared, own]


def rescored(config: Config, run: RunDir) -> tuple[Config, RunDir]:
    """The config and the folder under which an arm's trained model scores the pairs of the run."""
    folder = run.part()
    folder.scores = run.root / "rescored"
    return config.model_copy(update={"model": evaluated_model(config, run, "trained").model}), folder


def summarise_arms(evaluations: dict[str, list[Evaluation]], reference: str) -> pa.Table:
    """A row for each arm, benchmark and measure, from the evaluations of its models, one of each seed.

    `value` is the mean over prompts and seeds; `low` and `high` its 95 % interval over clusters, see `mean`;
    `seed_low` and `seed_high` the lowest and highest value of a single seed. Prompts with a verdict at some
    seeds alone count at none and are `dropped`. `difference` (`second` − `first`), its interval and `p`
    compare with the arm `reference`, where it is there, over the `paired_n` prompts of both, each prompt's
    mean over the seeds: how much other seeds would change is not in them. Of capability benchmarks only sums
    are known: the mean of the seeds and of their bounds, without a test.
    """
    values = {arm: [item_values(seed.scores) for seed in seeds] for arm, seeds in evaluations.items()}
    of = _all_clusters(evaluations)
    rows = []
    for arm, seeds in values.items():
        for key in dict.fromkeys(key for seed in seeds for key in seed):
            means, dropped = item_means([seed.get(key, {}) for seed in seeds])
            if not means:
                continue
            each = [float(np.mean([seed[key][item] for item in means])) for seed in seeds]
            row = _row(arm, key, len(means), each) | {"dropped": dropped}
            row |= mean(list(means.values()), [of[item] for item in means])
            if arm != reference and reference in values:
                first = [seed.get(key, {}) for seed in values[reference]]
                row |= _tested(item_means(first)[0], means, of)
            rows.append(row)
        rows += _capability(arm, [seed.summary.get("capability", {}) for seed in evaluations[arm]])
    return pa.Table.from_pylist(rows, schema=RESULT_SCHEMA)


def arm_differences(evaluations: dict[str, list[Evaluation]]) -> pa.Table:
    """How every two arms differ in the main measures, as `summarise_arms` has it of those with its reference.

    A row for each two arms, benchmark and measure: `difference` is `arm` − `reference`, the one that comes
    first. Of capability benchmarks only sums are known, so they are not here.
    """
    means: dict[str, dict[tuple[str, str], dict[str, float]]] = {}
    for arm, seeds in evaluations.items():
        values = [item_values(seed.scores) for seed in seeds]
        keys = dict.fromkeys(key for seed in values for key in seed if key[1].partition(",")[0] in MAIN)
        means[arm] = {key: item_means([seed.get(key, {}) for seed in values])[0] for key in keys}
    of, rows = _all_clusters(evaluations), []
    for first, second in combinations(means, 2):
        for key, items in means[first].items():
            if tested := _tested(items, means[second].get(key, {}), of):
                named = {"reference": first, "arm": second, "benchmark": key[0], "measure": key[1]}
                rows.append(named | tested)
    return pa.Table.from_pylist(rows, schema=DIFFERENCE_SCHEMA)


def _all_clusters(evaluations: Mapping[str, Sequence[Evaluation]]) -> dict[str, str]:
    """What every item asks about, see `item_clusters`."""
    tables = [seed.scores for seeds in evaluations.values() for seed in seeds]
    return {item: cluster for table in tables for item, cluster in item_clusters(table).items()}


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


def _tested(first: Mapping[str, float], second: Mapping[str, float], of: Mapping[str, str]) -> dict[str, Any]:
    """How the second differs from the first on the prompts of both; nothing where there are none."""
    both = sorted(first.keys() & second.keys())
    if not both:
        return {}
    a, b = ([side[item] for item in both] for side in (first, second))
    compared = paired_difference(a, b, [of[item] for item in both])
    names = {"n": "paired_n", "low": "difference_low", "high": "difference_high"}
    return {names.get(key, key): value for key, value in compared.items() if key != "test"}


def item_means(seeds: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], int]:
    """(each item's mean over the seeds, of those with a value at every seed; how many have not)"""
    everywhere = set.intersection(*map(set, seeds))
    somewhere = set.union(*map(set, seeds))
    means = {item: float(np.mean([seed[item] for seed in seeds])) for item in sorted(everywhere)}
    return means, len(somewhere) - len(everywhere)
