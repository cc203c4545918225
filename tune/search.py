"""Search for the safest model that still answers benign requests: Ray Tune around training and evaluation.

    python -m tune.search --config pipelines/configs/tune-sandbox.yaml [section.key=value ...]

Scores once (or finds the scores), runs the trials of `tune.space` with early stopping at rungs, evaluates
the best on prompts that no trial was evaluated on, and writes <run_dir>/tune: results.parquet, best.yaml (a
config for pipelines.run), summary.json and figures. The same command after a kill resumes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Self

import pyarrow as pa

from bdpo.cluster.status import StageStatus
from bdpo.config import Config, TuneConfig
from bdpo.config.derive import part_of, trial_config
from bdpo.errors import UserError
from bdpo.evaluation.answers import items_digest, planned_items
from bdpo.evaluation.judges.registry import judge_fingerprint
from bdpo.evaluation.results import read_evaluation
from bdpo.evaluation.tables import invalid_lines
from bdpo.evaluation.twins import count_near_twins
from bdpo.reports.page import write_figure
from bdpo.reports.search import search_figures
from bdpo.scoring.selection import training_rows
from bdpo.search.space import check_space, number_of_trials, product_keys
from bdpo.search.sweep import Sweep, read_trials
from bdpo.search.trials import Trial, check_rungs, end_of, results_table, winner
from bdpo.storage.manifests import Fingerprint, read_manifest, write_manifest
from bdpo.storage.paths import (
    StoragePath,
    discard,
    read_parquet,
    write_parquet,
    write_text,
)
from bdpo.storage.records import prepared_pairs
from bdpo.storage.run_dir import RunDir
from bdpo.variants.ends import End
from bdpo.variants.objective import check_held_out, check_measured
from pipelines.evaluate import EvaluateBase, EvaluateTrained, print_comparison, warn_of_screen
from pipelines.prepare import Prepare
from pipelines.runtime.cli import Command
from pipelines.runtime.progress import console
from pipelines.runtime.stage import Stage
from pipelines.runtime.variant_protocol import Limits
from pipelines.runtime.variants import check_evaluation, print_failures, require_room, run_variants
from pipelines.score import Score
from pipelines.train import Train, train_fingerprint
from tune.trial import Trials

if TYPE_CHECKING:
    from bdpo.cluster.preflight import Check


def run_search(config: Config, run: RunDir) -> None:
    """Run the trials that are missing, then write and print the results of all of them."""
    warn_of_screen(config)
    Prepare(config, run).complete()
    sweep = Sweep(config, run, sweep_fingerprint(config, run))
    sweep.refuse_other()
    if keys := product_keys(config):
        console.print(f"[bold]space[/]     {' and '.join(keys)} stand in the loss as their product alone")
    todo = sweep.todo()
    of, share = number_of_trials(config), config.evaluate.gpus_per_worker
    concurrent = require_room(config, run, of, "tune.max_concurrent_trials", share) if todo else 0
    pairs = prepared_pairs(run)
    if config.data.select is None and pairs:  # how many pairs it keeps is known when they are scored
        check_rungs(config, pairs)
    Score(config, run).complete()
    check_rungs(config, training_rows(config, run).num_rows)
    sweep.begin()
    sweep.reopen()
    trials = Trials(sweep, _base_scores(config, run.search_base("search")))
    if todo:
        stall_seconds = config.evaluate.stall_seconds
        limits = Limits(concurrent, config.tune.max_failures, share, stall_seconds)
        run_variants(trials, run.tune, todo, limits)
    console.print(trials.table())
    _finish(sweep)


def require_searchable(config: Config, run: RunDir) -> None:
    """Refuse, before the first trial, what would end a trial or the report.

    Raises:
        UserError: the space, or section `evaluate`, is not one that a search can work with.
    """
    check_space(config)
    check_evaluation(config, "a sweep", searched=True)


def _base_scores(config: Config, base: RunDir) -> pa.Table:
    """The scores of the base model, with which trials are compared on the prompts of every rung.

    Raises:
        UserError: the base model cannot be measured on the prompts of a rung.
    """
    summary = EvaluateBase(part_of(config, "search"), base).complete()
    if not summary.valid:
        why = "; ".join(invalid_lines("base", summary))
        raise UserError(f"there is nothing to compare trials with: {why}; the same command judges it again")
    scores = read_parquet(base.eval("base") / "scores.parquet")
    limit = config.tune.rung_limit
    rungs = [
        ("the prompts of the search", None),
        (f"tune.rung_limit={limit} prompts of each benchmark", limit),
    ]
    for which, most in rungs if len(config.tune.rungs) > 1 else rungs[:1]:
        items = [item.item_id for item in planned_items(part_of(config, "search", most))]
        check_measured(config.tune, scores, items, which)
    return scores


def sweep_fingerprint(config: Config, run: RunDir) -> Fingerprint:
    """Everything that the trials and their comparison depend on, field by field."""
    tune = config.tune.fingerprint()
    space = tune.pop("space")
    evaluate = {
        f"prompts of {part}": items_digest(planned_items(part_of(config, part)))
        for part in ("search", "held_out")
    }
    return {
        **{f"tune.space.{key}": dimension for key, dimension in space.items()},
        "tune.space": list(space),  # a grid, and what is suggested, depend on the order
        **{f"tune.{key}": value for key, value in tune.items()},
        **train_fingerprint(config, run),
        "train.workers": config.train.workers,
        **evaluate,
        **judge_fingerprint(config),
        "evaluate.max_new_tokens": config.evaluate.max_new_tokens,
        "evaluate.temperature": config.evaluate.temperature,
    }


def _finish(sweep: Sweep) -> None:
    """Evaluate the best trial and the base model on the held-out prompts; write table, figures, best.yaml."""
    run, trials, settings = sweep.run, sweep.trials(), sweep.config.tune
    results, best = results_table(trials, settings), winner(trials, settings)
    print_failures("trial", {trial.name: trial.failure for trial in trials if trial.failure})
    write_parquet(run.tune / "results.parquet", results)
    shown = read_evaluation(run.search_base("search").eval("base"))
    for figure, drawn in search_figures(results, settings, shown.summary).items():
        for suffix in ("png", "pdf"):
            write_figure(drawn, run.tune / f"{figure}.{suffix}")
    sweep.tidy_all(best)
    if best is None:
        console.print(_why_none(trials, settings), style="bold red", soft_wrap=True)
        sys.exit(1)
    write_text(run.tune / "best.yaml", _best_config(sweep, best).to_yaml())
    _report_held_out(sweep, best)
    values = " ".join(f"{key}={value}" for key, value in best.params.items())
    console.print(f"[bold]best[/]      trial {best.name}: {values}", soft_wrap=True)
    console.print(f"results   {run.tune}: best.yaml, results.parquet, summary.json, *.png", soft_wrap=True)


def _report_held_out(sweep: Sweep, best: Trial) -> None:
    """Evaluate the best trial and the base model on the held-out prompts; exit with 1 if that is invalid."""
    run, chosen = sweep.run, sweep.folder(best.name)
    base, held_out = run.search_base("held_out"), part_of(sweep.config_of(best), "held_out")
    summaries = {
        "base": EvaluateBase(held_out, base).complete(),
        "best": EvaluateTrained(held_out, chosen).complete(),
    }
    console.print("held-out prompts:")
    print_comparison({"base": base.eval("base"), "best": chosen.eval("trained")})
    invalid = [name for name, summary in summaries.items() if not summary.valid]
    if invalid:
        discard(run.tune / "summary.json")
        line = (
            f"the evaluation of {' and '.join(invalid)} is invalid; the same command asks for what is missing"
        )
        console.print(line, style="bold red", soft_wrap=True)
        sys.exit(1)
    scores = [read_evaluation(folder).scores for folder in (chosen.eval("trained"), base.eval("base"))]
    constraint = check_held_out(sweep.config.tune, *scores)
    console.print(constraint.sentence, style="green" if constraint.holds else "bold red", soft_wrap=True)
    parts = {part: planned_items(part_of(sweep.config, part)) for part in ("search", "held_out")}
    twins = count_near_twins(parts["held_out"], [item.request for item in parts["search"]])
    for benchmark, count in twins.items():
        console.print(f"{benchmark}: {count} held-out prompts nearly repeat prompts of the search")
    held = {name: summary.to_json() for name, summary in summaries.items()}
    found = {"best": best.name, "params": best.params, "held_out": held, "constraint": asdict(constraint)}
    found |= {"near_twins": twins}
    write_manifest(run.tune / "summary.json", sweep.fingerprint, **found)


def _why_none(trials: Sequence[Trial], settings: TuneConfig) -> str:
    """Why the search has no best trial."""
    ends = Counter(end_of(trial, trials, settings) for trial in trials)
    if ends[End.COMPLETED]:
        bound = settings.max_over_refusal
        return f"none of the {ends[End.COMPLETED]} completed trials is within tune.max_over_refusal={bound}"
    return f"no trial was completed: {', '.join(f'{count} {end}' for end, count in ends.items())}"


def _best_config(sweep: Sweep, best: Trial) -> Config:
    """A config for `pipelines.run`: the best trial, trained again and evaluated on the held-out prompts."""
    config = trial_config(sweep.config, best.params, f"{sweep.run.root}-best")
    evaluate = config.evaluate.model_copy(update={"part": "held_out"})
    return config.model_copy(update={"evaluate": evaluate, "tune": TuneConfig()})


class Search(Stage):
    """The search in a run folder: its trials, and the best of them."""

    name = "search"

    @classmethod
    def found_in(cls, config: Config, run: RunDir) -> Sequence[Self]:
        """The search, if the run folder has one."""
        return [cls(config, run)] if run.tune.is_dir() else []

    def outputs(self) -> list[StoragePath]:
        """Trials, tables, figures, and what the models answered."""
        return [self.run.tune, self.run.private / "tune"]

    def complete(self) -> None:
        """Run the trials that are missing, and write the results of all."""
        run_search(self.config, self.run)

    def status(self) -> StageStatus:
        """How many trials there are of each status, see `bdpo.search.trials.end_of`."""
        trials = read_trials(self.run)
        done = read_manifest(self.run.tune / "summary.json") is not None
        counts = Counter(str(end_of(trial, trials, self.config.tune)) for trial in trials)
        of = number_of_trials(self.config)
        return StageStatus.of(self.name, done, bool(trials), trials=len(trials), of=of, **counts)

    def input_checks(self) -> Mapping[str, Check]:
        """Those of the training of a trial."""
        return Train(self.config, self.run).input_checks()

    def further_checks(self) -> Mapping[str, Check]:
        """The space, the metric and the constraint can be used."""
        from bdpo.cluster.preflight import check_search

        return {"search": check_search}


main = Command(__doc__, (Prepare, Score, Search), run_search, requires=require_searchable)

if __name__ == "__main__":
    main()
