"""The page of a run: what was run, on which data, what came of it and what it cost.

Made from what lies in the run folder, of a run that is finished or not: a part of which there is nothing
is not there. Every word on it is a name, a number or ours; prompts and answers are in other folders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from bdpo.config import Config
from bdpo.evaluation.answers import MODEL_NAMES
from bdpo.evaluation.compare import compare
from bdpo.evaluation.reading import Evaluation, read_evaluation
from bdpo.evaluation.summary import comparison_rows, invalid_lines
from bdpo.mi_report import mi_difference, mi_scatter, mi_summary
from bdpo.page import BLUE, COLOURS, Grid, Page, Part, Picture
from bdpo.runs import MetricsLog, RunDir, read_manifest
from bdpo.scoring import finished_scores
from bdpo.search_figures import search_figures
from bdpo.storage import open_parquet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGES = ("bdpo", "ray", "torch", "deepspeed", "transformers")
SIGNIFICANT = 0.05
_POINTS_OF_A_CURVE = 400
_CURVES = {
    "loss": "loss",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "reward accuracy",
    "logps/chosen": "log π of the preferred response",
}


def run_page(config: Config, run: RunDir) -> Page:
    """All that there is to show of a run folder."""
    evaluations = run_evaluations(run)
    parts = [
        what_was_run(config, run),
        _data(run),
        understanding(config, run),
        training({"": [MetricsLog(run.metrics).read()]}),
        safety(evaluations),
        _search(config, run),
        _cost(config, run),
        _settings(config),
    ]
    title = f"{config.method.name} on {config.model.name_or_path}"
    return Page(title, _lead(config, evaluations), [part for part in parts if part is not None])


def run_evaluations(run: RunDir) -> dict[str, Evaluation]:
    """The finished evaluations of a run's models, by name."""
    there = [name for name in MODEL_NAMES if (run.eval(name) / "summary.json").is_file()]
    return {name: read_evaluation(run.eval(name)) for name in there}


def _lead(config: Config, evaluations: dict[str, Evaluation]) -> list[str]:
    lines = [f"Run folder {config.run_dir}, seed {config.seed}."]
    if "base" in evaluations and "trained" in evaluations:
        lines += sentences({name: evaluations[name] for name in ("base", "trained")}, main_only=True)
    return lines


def what_was_run(config: Config, run: RunDir) -> Part:
    """Model, method, data, training and the versions of this machine."""
    method, train = config.method, config.train
    rows = [
        ("model", f"{config.model.name_or_path} ({config.model.dtype})"),
        ("method", f"{method.name}: alpha {method.alpha:g}, beta {method.beta:g}, balance {method.balance}"),
        ("data", f"{config.data.path} ({config.data.format})"),
        ("training", f"{train.num_train_epochs} epochs of batches of {train.global_batch_size} pairs"),
        ("learning rate", f"{train.learning_rate:g}, {train.lr_scheduler_type}"),
        ("workers", f"{train.workers} x ZeRO-{train.zero_stage}"),
        ("versions here", ", ".join(f"{name} {_version(name)}" for name in PACKAGES)),
    ]
    manifest = read_manifest(run.scores / "manifest.json")
    marks = {} if manifest is None else manifest["fingerprint"]
    shown = ("weights", "tokenizer", "chat_template", "pairs", "unconditional")
    rows += [(f"scores: {name}", str(marks[name])) for name in shown if name in marks]
    return Part("What was run", grids=[Grid(("", ""), rows)])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _data(run: RunDir) -> Part | None:
    manifest = read_manifest(run.data / "manifest.json")
    if manifest is None:
        return None
    account = manifest["account"]
    rows = [("read", f"{account['rows']:,}"), ("kept", f"{account['kept']:,}")]
    for fate in ("quarantined", "excluded", "not_sampled"):
        found = account.get(fate, 0)
        if isinstance(found, dict):
            rows += [(f"{fate}: {reason}", f"{count:,}") for reason, count in found.items()]
        elif found:
            rows.append((fate.replace("_", " "), f"{found:,}"))
    return Part(
        "Data", ["Every row that was read is in one line of this account."], [Grid(("", "rows"), rows)]
    )


def understanding(config: Config, run: RunDir) -> Part | None:
    """The mutual information of the pairs, if they are scored."""
    if read_manifest(run.scores / "manifest.json") is None:
        return None
    _, scores = finished_scores(run)
    rows = []
    for row in mi_summary(scores, config.method):
        for side in ("chosen", "rejected"):
            mi = row[side]
            numbers = [f"{number:.3f}" for number in (mi["mean"], *mi["quantiles"])]
            shares = [f"{100 * mi[share]:.1f} %" for share in ("negative", "floored")]
            rows.append((f"{row['group'] or 'all'} queries, {side}", f"{row['pairs']:,}", *numbers, *shares))
    headings = (
        "nats per token",
        "pairs",
        "mean",
        "5 %",
        "25 %",
        "50 %",
        "75 %",
        "95 %",
        "below 0",
        "floored",
    )
    better = [
        f"Of the {row['group'] or 'all'} queries the preferred response is better understood in "
        f"{row['chosen_better']:.0%}."
        for row in mi_summary(scores, config.method)
    ]
    pictures = [
        Picture(
            "mi", mi_scatter(scores), "Mutual information of both responses of each pair, nats per token."
        ),
        Picture("mi-difference", mi_difference(scores), "How differently the two are understood."),
    ]
    return Part("What the reference model understands", better, [Grid(headings, rows)], pictures)


def training(logs: Mapping[str, Sequence[Sequence[dict[str, Any]]]]) -> Part | None:
    """Curves of one or more trainings: name -> a log for each seed; the name "" wants no legend."""
    logs = {name: [log for log in seeds if log] for name, seeds in logs.items()}
    logs = {name: seeds for name, seeds in logs.items() if seeds}
    if not logs:
        return None
    rows = []
    for name, seeds in logs.items():
        last = [log[-1] for log in seeds]
        numbers = (f"{np.mean([row[key] for row in last]):.3f}" for key in _CURVES)
        rows.append((name or "last step", str(int(last[0]["step"])), *numbers))
    pictures = [
        Picture(f"curve-{key.replace('/', '-')}", _curves(logs, key, label), f"{label}, by step.")
        for key, label in _CURVES.items()
    ]
    return Part("Training", grids=[Grid(("", "steps", *_CURVES.values()), rows)], pictures=pictures)


def _curves(logs: dict[str, Sequence[Sequence[dict[str, Any]]]], key: str, label: str) -> Figure:
    """The mean over seeds, and from the lowest to the highest seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, seeds) in enumerate(logs.items()):
        steps = min(len(log) for log in seeds)
        values = np.array([[row[key] for row in log[:steps]] for log in seeds], dtype=float)
        at = np.unique(np.linspace(0, steps - 1, min(steps, _POINTS_OF_A_CURVE)).astype(int))
        colour = COLOURS[number % len(COLOURS)] if name else BLUE
        line = ("-", "--", ":")[number // len(COLOURS) % 3]
        axes.plot(at + 1, values.mean(0)[at], c=colour, ls=line, lw=1.3, label=name)
        if len(seeds) > 1:
            axes.fill_between(at + 1, values.min(0)[at], values.max(0)[at], color=colour, alpha=0.18, lw=0)
    axes.set(xlabel="step", ylabel=label)
    axes.spines[["top", "right"]].set_visible(False)
    if len(logs) > 1:
        axes.legend(frameon=False, fontsize="small", ncols=2)
    return figure


def safety(evaluations: dict[str, Evaluation]) -> Part | None:
    """The evaluated models side by side, and what their differences amount to."""
    if not evaluations:
        return None
    table = comparison_rows({name: read.summary for name, read in evaluations.items()})
    rows = [
        (
            f"– {row['category']}" if row["category"] else row["measure"],
            row["n"],
            *(row[name] for name in evaluations),
        )
        for row in table
    ]
    invalid = [line for name, read in evaluations.items() for line in invalid_lines(name, read.summary)]
    grid = Grid(("percent", "n", *evaluations), rows, "With 95 % intervals over prompts.")
    return Part("Safety and usefulness", [*invalid, *sentences(evaluations)], [grid])


def sentences(evaluations: dict[str, Evaluation], main_only: bool = False) -> list[str]:
    """What every two models' difference amounts to, a sentence a measure."""
    said = []
    for first, second in combinations(evaluations, 2):
        for row in compare(evaluations[first].scores, evaluations[second].scores):
            if not main_only or row["measure"] in ("safety", "compliance"):
                said.append(sentence(measure_name(row), first, second, row))
    return said


def measure_name(row: dict[str, Any]) -> str:
    """`StrongReject safety`, of a row with `benchmark` and `measure`."""
    names = {"strongreject": "StrongReject", "xstest": "XSTest", "simpleqa": "SimpleQA"}
    return f"{names.get(row['benchmark'], row['benchmark'])} {row['measure'].replace('_', ' ')}"


def sentence(measure: str, first: str, second: str, row: dict[str, Any]) -> str:
    """One comparison in words; `row` is what `paired_difference` says."""
    values = f"{second} {100 * row['second']:.1f} %, {first} {100 * row['first']:.1f} %"
    if row["difference"] == 0:
        return f"{measure}: {values}; no difference on these {row['n']} prompts."
    points = f"{100 * row['difference']:+.1f} points"
    if row["low"] is not None:
        points += f" (95 % interval {100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
    p = "p < 0.001" if row["p"] < 0.001 else f"p = {row['p']:.2g}"
    meant = "more than chance explains" if row["p"] < SIGNIFICANT else "chance may explain it"
    return f"{measure}: {values}: {points}, {p}, {meant}."


def _search(config: Config, run: RunDir) -> Part | None:
    file = run.tune / "results.parquet"
    if not file.is_file():
        return None
    results = pq.read_table(open_parquet(file))
    base = read_evaluation(run.part("tune", "base", "search").eval("base")).summary
    pictures = [Picture(name, figure) for name, figure in search_figures(results, config.tune, base).items()]
    keys = list(config.tune.space)
    rows = [
        (
            row["trial"] + (" (chosen)" if row["winner"] else ""),
            *(f"{row[key]:g}" if isinstance(row[key], float) else str(row[key]) for key in keys),
            row["status"],
            _percent(row["objective"]),
            _percent(row["constraint"]),
        )
        for row in results.to_pylist()
    ]
    headings = ("trial", *keys, "status", config.tune.metric, config.tune.constraint)
    return Part("Search", grids=[Grid(headings, rows)], pictures=pictures)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _cost(config: Config, run: RunDir) -> Part | None:
    """Seconds of each finished stage, and GPU-hours as workers x GPUs x time."""
    stages: list[tuple[str, Any, float]] = [
        ("score", run.scores / "manifest.json", _gpus(config.score)),
        ("train", run.train / "manifest.json", _gpus(config.train)),
        *(
            (f"evaluate {name}", run.eval(name) / "summary.json", _gpus(config.evaluate))
            for name in MODEL_NAMES
        ),
    ]
    rows, total = [], 0.0
    for stage, file, gpus in stages:
        manifest = read_manifest(file)
        if manifest is not None and "seconds" in manifest:
            hours = gpus * manifest["seconds"] / 3600
            total += hours
            rows.append((stage, f"{manifest['seconds']:,.0f}", f"{gpus:g}", f"{hours:.2f}"))
    if not rows:
        return None
    rows.append(("all", "", "", f"{total:.2f}"))
    text = ["Of the last command that worked on a stage; a pool that grows counts with its largest size."]
    return Part("Time and cost", text, [Grid(("stage", "seconds", "GPUs", "GPU-hours"), rows)])


def _gpus(section: Any) -> float:
    workers = section.workers if isinstance(section.workers, int) else section.workers[1]
    return float(workers * section.gpus_per_worker)


def _settings(config: Config) -> Part:
    rows = []
    for section, values in config.model_dump().items():
        if isinstance(values, dict):
            rows += [(f"{section}.{key}", str(value)) for key, value in values.items()]
        else:
            rows.append((section, str(values)))
    return Part("All settings", grids=[Grid(("", ""), rows)], folded=True)
