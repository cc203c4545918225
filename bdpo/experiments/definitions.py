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

from collections.abc import Callable
from dataclasses import dataclass

from bdpo.config import Config
from bdpo.config.derive import value_at
from bdpo.errors import UserError
from bdpo.experiments.arms import Arm, _method


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
    rule = "softmax" if value_at(config, "method.balance") == "softmax" else "ratio"
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
