"""The page of a run: its setup, data, results and cost.

The page is made from the files in the run folder, whether the run is finished or not; a section without
results is left out. The page contains names, numbers and fixed sentences alone: prompts and answers never
reach this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bdpo.config import Config, TuneConfig, recorded_config, workers_label
from bdpo.evaluation.judges.registry import judge_label
from bdpo.evaluation.results import Evaluation, finished_models, read_evaluation
from bdpo.reports.cost import TimedStage, cost_section, search_costs, stage_costs
from bdpo.reports.evaluation import comparison_sentences, evaluation_section, tamper_section
from bdpo.reports.page import (
    BLUE,
    COLOURS,
    Page,
    PageSection,
    PageTable,
    Picture,
    plain_axes,
)
from bdpo.reports.scores import QUANTILES, mi_difference, mi_imbalance, mi_scatter, mi_summary
from bdpo.reports.search import search_figures
from bdpo.scoring.scores import finished_scores
from bdpo.stats import ENDS, percent_of
from bdpo.storage.manifests import read_manifest
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.paths import read_parquet, sorted_glob
from bdpo.storage.records import TrainingRecord, account_notes, prepared_rows, training_record
from bdpo.storage.records import versions as package_versions
from bdpo.storage.run_dir import RunDir

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_POINTS_OF_A_CURVE = 400

_CURVES = {
    "loss": "loss",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "reward accuracy",
    "logps/chosen": "log π of the preferred response",
}


def run_page(config: Config, run: RunDir, stages: Sequence[TimedStage]) -> Page:
    """The page of a run folder; `config` is that of its last command, `stages` are those of the run.

    A trained model is shown with the config with which it was trained.
    """
    config = trained_config(config, run)
    evaluations = run_evaluations(run)
    sections = [
        setup_section(config, run, training_record(run)),
        data_section(run),
        mutual_information_section(config, run),
        training_section({"": [MetricsLog(run.metrics).read()]}),
        evaluation_section(evaluations),
        tamper_section(run, evaluations),
        _search(run),
        _experiments(run),
        cost_section([*stage_costs(stages), *search_costs(config, run)]),
        settings_section(config),
    ]
    title = f"{config.method.name} on {config.model.name_or_path}"
    lead = _lead(run, config.seed, evaluations)
    return Page(title, lead, [section for section in sections if section is not None])


def trained_config(config: Config, run: RunDir) -> Config:
    """The config with which the model in a run folder was trained, `config` if there is no model."""
    record = training_record(run)
    return recorded_config(dict(record.config), str(run.train)) if record and record.config else config


def run_evaluations(run: RunDir) -> dict[str, Evaluation]:
    """The finished evaluations of a run's models, by name."""
    return {name: read_evaluation(folder) for name, folder in finished_models(run).items()}


def _lead(run: RunDir, seed: int, evaluations: dict[str, Evaluation]) -> list[str]:
    lines = [f"Run folder {run.root}, seed {seed}."]  # it may have been moved since the config was recorded
    if "base" in evaluations and "trained" in evaluations:
        both = {name: evaluations[name] for name in ("base", "trained")}
        lines += comparison_sentences(both, main_only=True)
        judge = both["trained"].judge
        lines += [f"These numbers were judged by {judge.label}."] if judge.name else []
    return lines


def setup_section(
    config: Config, run: RunDir, trained: TrainingRecord | None, arms: bool = False
) -> PageSection:
    """Model, method, data and training; package versions come from `trained`, the record of a training.

    With `arms` the methods are left out: the page of an experiment has a table of its arms.
    """
    method, train = config.method, config.train
    recorded = trained.versions if trained else {}
    versions = recorded or package_versions()
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    own_rates = arms and config.experiment.learning_rates
    rate = "that of each arm, see below" if own_rates else f"{train.learning_rate:g}"
    rows = [("model", f"{config.model.name_or_path} ({config.model.dtype})")]
    if not arms:
        how = ", ".join(f"{key} {value}" for key, value in method.model_dump(exclude={"name"}).items())
        rows.append(("method", f"{method.name}: {how}" if how else method.name))
    length = f"steps: {train.max_steps}" if train.max_steps else f"epochs: {train.num_train_epochs:g}"
    rows += [
        ("data", f"{config.data.names} ({_format_found(config, run)})"),
        ("training", f"{length}, each batch of {train.global_batch_size} pairs"),
        ("learning rate", f"{rate}, {train.lr_scheduler_type}"),
        ("workers", f"{workers_label(train.workers)} x ZeRO-{train.zero_stage}"),
        ("versions" if recorded else "versions that wrote this page", named),
    ]
    rows.append(("judge", judge_label(config)))
    manifest = read_manifest(run.scores / "manifest.json")
    marks = {} if manifest is None else manifest.fingerprint
    shown = ("weights", "tokenizer", "chat_template", "pairs", "unconditional")
    rows += [(f"scores: {name}", str(marks[name])) for name in shown if name in marks]
    return PageSection("Setup", tables=[PageTable(("", ""), rows)])


def _format_found(config: Config, run: RunDir) -> str:
    """The format that the rows were found to have, that of the config before they are prepared."""
    account = prepared_rows(run)
    return config.data.format if account is None else account["format"]


def data_section(run: RunDir, trained: bool = True) -> PageSection | None:
    """The account of the rows that were read; with `trained` also of the pairs that were trained on."""
    account = prepared_rows(run)
    if account is None:
        return None
    rows = [("read", f"{account['rows']:,}")]
    for fate, counts in (("quarantined", account["quarantined"]), ("excluded", account["excluded"])):
        rows += [(f"{fate}: {reason}", f"{count:,}") for reason, count in sorted(counts.items())]
    rows += [("not sampled", f"{account['not_sampled']:,}")] if account["not_sampled"] else []
    rows.append(("prepared", f"{account['kept']:,}"))
    groups = {"no group" if group == "none" else group: n for group, n in account["groups"].items()}
    rows += [(f"prepared, {group}", f"{count:,}") for group, count in sorted(groups.items())]
    if trained:
        rows += _trained_on(run)
    text = ["Rows read = quarantined + excluded + not sampled + prepared."]
    text += [f"{note[0].upper()}{note[1:]}." for note in account_notes(account)]
    return PageSection("Data", text, [PageTable(("", "rows"), rows)])


def _trained_on(run: RunDir) -> list[tuple[str, str]]:
    """The account of the pairs in the record of the training."""
    record = training_record(run)
    if record is None:
        return []
    pairs = {key: count for key, count in record.pairs.items() if key != "prepared"}
    safety = {f"safety labels: {key.replace('_', ' ')}": n for key, n in record.safety.items()}
    return [(key, f"{count:,}") for key, count in (pairs | safety).items()]


def mutual_information_section(config: Config, run: RunDir) -> PageSection | None:
    """The mutual information of the pairs, None before they are scored."""
    if read_manifest(run.scores / "manifest.json") is None:
        return None
    _, scores = finished_scores(run)
    summary, imbalance = mi_summary(scores, config.method), mi_imbalance(scores)
    rows = []
    for row in summary:
        queries, pairs = f"{row.group or 'all'} queries", f"{row.pairs:,}"
        for side, mi in (("chosen", row.chosen), ("rejected", row.rejected)):
            numbers = [f"{number:.3f}" for number in (mi.mean, *mi.quantiles)]
            shares = [f"{100 * share:.1f} %" for share in (mi.negative, mi.floored)]
            rows.append((f"{queries}, {side}", pairs, *numbers, *shares))
        if row.ches is not None:
            numbers = [f"{number:.4g}" for number in (row.ches.mean, *row.ches.quantiles)]
            rows.append((f"{queries}, CHES", pairs, *numbers, "", ""))
    quantiles = [f"{quantile:.0%}" for quantile in QUANTILES]
    headings = ("nats per token", "pairs", "mean", *quantiles, "below 0", "floored")
    better = [
        f"Of {f'the {row.group}' if row.group else 'all'} queries the preferred response is better "
        f"understood in {100 * row.chosen_better:.1f} % (95 % interval {100 * row.chosen_better_low:.1f} to "
        f"{100 * row.chosen_better_high:.1f}); I_w − I_l is {row.difference:+.3f} on average "
        f"({row.low:+.3f} to {row.high:+.3f})."
        for row in imbalance
    ]
    pictures = [
        Picture("mi", mi_scatter(scores), "Mutual information of both responses, nats per token."),
        Picture(
            "mi-difference",
            mi_difference(scores),
            "Difference of the mutual information of the two responses.",
        ),
    ]
    caption = "CHES has no unit; a greater value means more similar hidden states of the two responses."
    table = PageTable(headings, rows, caption if any(row.ches for row in summary) else "")
    return PageSection("Mutual information under the reference model", better, [table], pictures)


def training_section(logs: Mapping[str, Sequence[Sequence[dict[str, Any]]]]) -> PageSection | None:
    """Curves of one or more trainings: name -> a log for each seed; a single training is named "".

    A method that compares no responses has no curve of rewards.
    """
    logs = {name: [log for log in seeds if log] for name, seeds in logs.items()}
    logs = {name: seeds for name, seeds in logs.items() if seeds}
    if not logs:
        return None
    rows = []
    for name, seeds in logs.items():
        last = [log[-1] for log in seeds]
        numbers = (f"{np.mean([row[key] for row in last]):.3f}" if key in last[0] else "" for key in _CURVES)
        rows.append((name or "last step", str(int(last[0]["step"])), *numbers))
    having = {key: {name: of for name, of in logs.items() if key in of[0][-1]} for key in _CURVES}
    pictures = [
        Picture(f"curve-{key.replace('/', '-')}", _curves(having[key], key, label), f"{label}, by step.")
        for key, label in _CURVES.items()
        if having[key]
    ]
    return PageSection(
        "Training", tables=[PageTable(("", "steps", *_CURVES.values()), rows)], pictures=pictures
    )


def _curves(logs: dict[str, Sequence[Sequence[dict[str, Any]]]], key: str, label: str) -> Figure:
    """The mean over seeds as a line, and the range of the seeds as a band."""
    figure, axes = plain_axes(4.6, 3.0)
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
    if len(logs) > 1:
        axes.legend(frameon=False, fontsize="small", ncols=2)
    return figure


def _search(run: RunDir) -> PageSection | None:
    begun, file = read_manifest(run.tune / "begun.json"), run.tune / "results.parquet"
    if begun is None or not file.is_file():
        return None
    tune = sweep_settings(begun.fingerprint)
    results = read_parquet(file)
    base = read_evaluation(run.search_base("search").eval("base")).summary
    figures = search_figures(results, tune, base)
    rows = [
        (
            row["trial"] + (" (chosen)" if row.get("winner") else ""),
            *(f"{row[key]:g}" if isinstance(row[key], float) else str(row[key]) for key in tune.space),
            row["status"],
            *(_with_interval(row, name) for name in ("objective", "constraint")),
        )
        for row in results.to_pylist()
    ]
    headings = ("trial", *tune.space, "status", tune.metric, tune.constraint)
    summary, text = read_manifest(run.tune / "summary.json"), []
    if summary is not None:
        folders = {
            "base": run.search_base("held_out").eval("base"),
            "best": run.part("tune", "trials", summary["best"]).eval("trained"),
        }
        text = ["The chosen trial, evaluated on prompts that the search did not use:"]
        text += [summary["constraint"]["sentence"]] if "constraint" in summary else []
        text += [
            f"{benchmark}: {count} held-out prompts nearly repeat prompts of the search."
            for benchmark, count in summary.get("near_twins", {}).items()
        ]
        text += comparison_sentences({name: read_evaluation(folder) for name, folder in folders.items()})
    pictures = [Picture(f"search-{name}", figure) for name, figure in figures.items()]
    return PageSection("Search", text, [PageTable(headings, rows, "Percent, 95 % intervals.")], pictures)


def sweep_settings(fingerprint: dict[str, Any]) -> TuneConfig:
    """The config section `tune` of a sweep, from the fingerprint of its inputs; see `tune.search`."""
    keys = {key.removeprefix("tune."): value for key, value in fingerprint.items() if key.startswith("tune.")}
    dimensions = {key: keys.pop(key) for key in list(keys) if key.startswith("space.")}
    space = {key: dimensions[f"space.{key}"] for key in keys.pop("space")}
    return TuneConfig.model_validate({**keys, "space": space})


def _with_interval(row: dict[str, Any], name: str) -> str:
    if row.get(name) is None:
        return ""
    return percent_of(*(row[f"{name}{end}"] for end in ENDS))


def _experiments(run: RunDir) -> PageSection | None:
    """The pages of the experiments in the run folder."""
    names = [page.parent.name for page in sorted_glob(run.root / "experiments", "*/report.html")]
    return (
        PageSection("Experiments", [f"experiments/{name}/report.html" for name in names]) if names else None
    )


def settings_section(config: Config) -> PageSection:
    """All keys of the config."""
    rows = []
    for section, values in config.model_dump().items():
        if isinstance(values, dict):
            rows += [(f"{section}.{key}", str(value)) for key, value in values.items()]
        else:
            rows.append((section, str(values)))
    return PageSection("All settings", tables=[PageTable(("", ""), rows)], folded=True)
