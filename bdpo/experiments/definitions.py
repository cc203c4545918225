"""The paper's experiments, and those beyond it: what each changes of a run's config.

An arm is trained once for each seed, on the pairs and scores of the run, in a folder that all experiments
share: it is named after what is trained, so DPO is trained once and not once for every experiment.

    <run_dir>/experiments/arms/<arm>/seed-0/       a run folder: config.yaml, metrics.jsonl, model/, eval/;
                                                   rescored/ if an experiment `rescores`, failed.json if it
                                                   has no result
    <run_dir>/experiments/arms-search/, arms-held_out/, base-*/   the same on a part of the prompts
    <run_dir>/experiments/context-bos/             the pairs' scores with another unconditional context
    <run_dir>/experiments/<name>/experiment.json   what it was run with, see `ExperimentRecord`
    <run_dir>/experiments/<name>/results.csv       a row for each arm and measure, with its interval
    <run_dir>/experiments/<name>/differences.csv   how every two arms differ
    <run_dir>/experiments/<name>/rates.csv         of a search for learning rates: the results of each rate
    <run_dir>/experiments/<name>/<finding>.csv     results of the experiment's own, see `Finding`
    <run_dir>/experiments/<name>/*.png             the figures
    <run_dir>/experiments/<name>/report.html       all of it on one page
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import pyarrow as pa

from bdpo.config import Config
from bdpo.config.derive import trial_config, value_at
from bdpo.errors import UserError
from bdpo.experiments.arms import Arm, as_method, method_params
from bdpo.experiments.displacement import DISPLACEMENT
from bdpo.experiments.experiment import Experiment, Finding
from bdpo.experiments.jobs import Job
from bdpo.scoring.scores import finished_scores
from bdpo.storage.run_dir import RunDir


def _imbalance(run: RunDir, trained: Sequence[Job]) -> list[Finding]:
    """The table behind Figure 2; the page shows the figure of every run's scores."""
    from bdpo.reports.scores import mi_imbalance  # imports SciPy, which a list of experiments does not need

    rows = [asdict(row) for row in mi_imbalance(finished_scores(run)[1])]
    return [Finding("results", pa.Table.from_pylist(rows))]


IMBALANCE = Experiment(
    "Imbalanced understanding (Figure 2)",
    "Does the reference model understand one response of a pair better than the other?",
    findings=_imbalance,
)


def _halves(config: Config) -> tuple[Arm, ...]:
    if config.data.select:
        raise UserError("data.select: balanced-subset selects halves of all pairs; leave it out")
    bounds = {"balanced": [0.0, 0.5], "imbalanced": [0.5, 1.0]}
    dpo = method_params("dpo", config)
    return tuple(Arm(name, dpo | {"data.select": {"mi_difference": half}}) for name, half in bounds.items())


BALANCED_SUBSET = Experiment(
    "Balanced and imbalanced pairs (Figures 3 and 4)",
    "Does plain DPO do better on the half of the pairs whose responses are understood alike?",
    _halves,
)


def _methods(config: Config) -> tuple[Arm, ...]:
    names = ("bdpo", "dpo", "cpo", "simpo", "safedpo")
    return tuple(Arm(name, method_params(name, config)) for name in names)


METHOD_COMPARISON = Experiment(
    "Methods (Table 1)",
    "Is B-DPO safer than the other methods, and does it stay as useful?",
    _methods,
)


def _parts_of_bdpo(config: Config) -> tuple[Arm, ...]:
    rule = "softmax" if value_at(config, "method.balance") == "softmax" else "ratio"
    other = {"ratio": "softmax", "softmax": "ratio"}[rule]
    bdpo, dpo_bw = (method_params(name, config) | {"method.balance": rule} for name in ("bdpo", "dpo_bw"))
    context = {"empty_turn": "bos", "bos": "empty_turn"}[config.score.unconditional]
    return (
        Arm("bdpo", bdpo),
        Arm("dpo", method_params("dpo", config)),
        Arm("dpo_bw", dpo_bw),
        Arm("dpo_sf", method_params("dpo_sf", config)),
        Arm(f"bdpo-{other}", bdpo | {"method.balance": other}),
        Arm(f"bdpo-{context}", bdpo | {"score.unconditional": context}),
    )


ABLATION = Experiment(
    "The parts of B-DPO (Table 2)",
    "Which part does it: the balance weights (BW), the scaling factor (SF), the rule, the context?",
    _parts_of_bdpo,
)


def _over(name: str) -> Callable[[Config], tuple[Arm, ...]]:
    """DPO, then B-DPO at every value that section `experiment` has of a key of the method."""

    def arms(config: Config) -> tuple[Arm, ...]:
        bdpo, values = method_params("bdpo", config), getattr(config.experiment, f"{name}s")
        curve = (Arm(f"{name}-{value}", bdpo | {f"method.{name}": value}) for value in values)
        return (Arm("dpo", method_params("dpo", config)), *curve)

    return arms


ALPHA = Experiment(
    "The scaling factor α (Figure 5)",
    "How much does the total of the two weights matter?",
    _over("alpha"),
    axis="method.alpha",
)

BETA = Experiment(
    "The strength β of the reference", "How much does β matter?", _over("beta"), axis="method.beta"
)


def _following(config: Config) -> tuple[Arm, ...]:
    """The weights of the scores, and two that follow the policy as often as the config has it."""
    bdpo = method_params("bdpo", config)
    own = value_at(as_method(config, "bdpo"), "method.reestimate") or {}
    follows = bdpo | {"method.reestimate": dict(own)}
    filled = trial_config(config, follows, config.run_dir, source="experiment reestimation")
    settings = value_at(filled, "method.reestimate").model_dump()
    return (
        Arm("bdpo", bdpo | {"method.reestimate": None}),
        *(
            Arm(f"follows-{source}", bdpo | {"method.reestimate": settings | {"source": source}})
            for source in ("policy", "mix")
        ),
    )


REESTIMATION = Experiment(
    "Balance weights that follow the policy",
    "Does it help to estimate the mutual information again while the policy changes?",
    _following,
)

EXPERIMENTS = {
    "imbalance": IMBALANCE,
    "balanced-subset": BALANCED_SUBSET,
    "methods": METHOD_COMPARISON,
    "ablation": ABLATION,
    "alpha": ALPHA,
    "beta": BETA,
    "displacement": DISPLACEMENT,
    "reestimation": REESTIMATION,
}
