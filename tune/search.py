"""Search for the safest model that still answers benign requests: Ray Tune around training and evaluation.

    python -m tune.search --config pipelines/configs/tune-sandbox.yaml [section.key=value ...]

Scores once (or finds the scores), runs the trials of `tune.space` with early stopping at rungs, evaluates
the best on prompts that no trial was judged by, and writes <run_dir>/tune: results.parquet, best.yaml (a
config for pipelines.run), summary.json and figures. The same command after a kill goes on where it stopped.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
from rich.live import Live
from rich.table import Table

from bdpo.cluster.placement import max_concurrent
from bdpo.cluster.status import StageStatus
from bdpo.config import Config, TuneConfig
from bdpo.config.derive import part_of, trial_config
from bdpo.data.pairs import count_pairs
from bdpo.errors import UserError
from bdpo.evaluation.answers import items_digest, planned_items
from bdpo.evaluation.judges.registry import judge_fingerprint
from bdpo.evaluation.results import read_evaluation
from bdpo.evaluation.tables import invalid_lines
from bdpo.reports.page import write_figure
from bdpo.reports.search import search_figures
from bdpo.scoring.selection import training_rows
from bdpo.search.space import check_space, number_of_trials
from bdpo.search.sweep import Sweep
from bdpo.search.trials import Trial, check_rungs, end_of, results_table, winner
from bdpo.storage.manifests import Fingerprint, read_manifest, write_manifest
from bdpo.storage.paths import (
    StoragePath,
    arrow_filesystem,
    discard,
    open_parquet,
    parquet_bytes,
    read_bytes,
    write_bytes,
    write_text,
)
from bdpo.storage.run_dir import RunDir
from bdpo.variants.ends import RETRIED, End
from bdpo.variants.objective import check_measured, check_measures
from pipelines.evaluate import EvaluateBase, EvaluateTrained, print_comparison
from pipelines.prepare import Prepare
from pipelines.runtime.cli import Command
from pipelines.runtime.cluster import cluster_nodes, connect
from pipelines.runtime.progress import console
from pipelines.runtime.stage import Stage, check_inputs
from pipelines.score import Score
from pipelines.train import train_fingerprint

if TYPE_CHECKING:
    from bdpo.cluster.preflight import Check

# Where and how often is not what: these keys may change between a kill and the resume.
_FREE = {"num_samples", "max_concurrent_trials", "max_failures"}


def run_search(config: Config, run: RunDir) -> None:
    """Run the trials that are missing, then write and print what came of all of them."""
    _refuse_early(config, run)
    Prepare(config, run).complete()
    sweep = Sweep(config, run, sweep_fingerprint(config, run))
    sweep.refuse_other()
    todo = sweep.todo()
    concurrent = _require_room(config, run) if todo else 0
    if config.data.select is None:  # how many pairs it keeps is known when they are scored
        check_rungs(config, count_pairs(run.pairs))
    Score(config, run).complete()
    check_rungs(config, training_rows(config, run).num_rows)
    sweep.begin()
    sweep.reopen()
    base_scores = _base_scores(config, run.part("tune", "base", "search"))
    if todo:
        _run_trials(sweep, base_scores, todo, concurrent)
    _finish(sweep)


def _refuse_early(config: Config, run: RunDir) -> None:
    """What would stop a trial, or the report, stops the sweep before its first."""
    check_space(config)
    check_measures(config)
    check_inputs([Prepare(config, run)])
    if config.evaluate.engine != "transformers":
        raise UserError("evaluate.engine: a sweep evaluates with engine=transformers")
    for part in ("search", "held_out"):
        planned_items(part_of(config, part))


def _base_scores(config: Config, base: RunDir) -> pa.Table:
    """What trials are compared with; made sure that at every rung there is something to compare.

    Raises:
        UserError: there is not.
    """
    summary = EvaluateBase(part_of(config, "search"), base).complete()
    if not summary.valid:
        why = "; ".join(invalid_lines("base", summary))
        raise UserError(f"there is nothing to compare trials with: {why}; the same command judges it again")
    scores = pq.read_table(open_parquet(base.eval("base") / "scores.parquet"))
    limit = config.tune.rung_limit
    rungs = [
        ("the prompts of the search", None),
        (f"the first tune.rung_limit={limit} of a benchmark", limit),
    ]
    for which, most in rungs if len(config.tune.rungs) > 1 else rungs[:1]:
        items = [item.item_id for item in planned_items(part_of(config, "search", most))]
        check_measured(config.tune, scores, items, which)
    return scores


def sweep_fingerprint(config: Config, run: RunDir) -> Fingerprint:
    """Everything that trials and their comparison depend on, field by field."""
    tune = config.tune.model_dump(exclude=_FREE | {"space"})
    space = config.tune.model_dump(include={"space"})["space"]
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


def _require_room(config: Config, run: RunDir) -> int:
    """How many trials run at a time; a cluster that can hold none is refused before anything is scored."""
    from pipelines.preflight import refuse_what_does_not_fit
    from pipelines.runtime.plan_table import require_memory

    require_memory(config)
    refuse_what_does_not_fit(config, run)
    most, of = config.tune.max_concurrent_trials, number_of_trials(config.tune)
    share = config.evaluate.gpus_per_worker
    return max_concurrent(config, cluster_nodes(), of, most, "tune.max_concurrent_trials", share)


def _run_trials(sweep: Sweep, base_scores: pa.Table, todo: int, concurrent: int) -> None:
    # Tune's own files, tables and tracebacks would say again what the sweep's files and table say.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Tune would return, as if the sweep were done
    connect()
    from ray import tune
    from ray.tune import CheckpointConfig, FailureConfig, PlacementGroupFactory, RunConfig, Tuner

    from tune.secrets import keep_secrets
    from tune.steering import Failures, Suggestions, Survival
    from tune.trial import TrialActor

    keep_secrets()
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    actor = tune.with_parameters(TrialActor, sweep=sweep, base_scores=base_scores)
    discard(sweep.run.tune / "ray")
    filesystem, storage_path = arrow_filesystem(sweep.run.tune)
    tuner = Tuner(
        tune.with_resources(actor, PlacementGroupFactory([driver_resources(sweep.config)])),
        tune_config=tune.TuneConfig(
            search_alg=Suggestions(sweep),
            scheduler=Survival(sweep),
            num_samples=todo,
            max_concurrent_trials=concurrent,
            reuse_actors=True,
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=sweep.config.tune.max_failures),
            checkpoint_config=CheckpointConfig(checkpoint_at_end=False),  # trials keep their own
            callbacks=[Failures(sweep)],
            verbose=0,
        ),
    )
    console.print(f"[bold]trials[/]    {todo} to do, {concurrent} at the same time")
    with Live(
        get_renderable=lambda: trials_table(sweep),
        console=console,
        refresh_per_second=1,
        transient=True,
    ):
        tuner.fit()
    discard(sweep.run.tune / "ray")


def driver_resources(config: Config) -> dict[str, float]:
    """What the driver of a trial holds: its share of a GPU to evaluate with.

    Without one it stays on the head node, which no autoscaler takes away.
    """
    gpus = config.evaluate.gpus_per_worker
    return {"CPU": 0, "GPU": gpus} if gpus else {"CPU": 0, "node:__internal_head__": 0.001}


def trials_table(sweep: Sweep) -> Table:
    """Every trial as it stands: parameters, how far it is, and what its last rung showed, in percent."""
    trials, settings = sweep.trials(), sweep.config.tune
    best = winner(trials, settings)
    table = Table(caption=f"{settings.metric}, {settings.constraint} on the prompts of the search, percent")
    keys = [key.rpartition(".")[2] for key in settings.space]
    for column in ("trial", *keys, "status", "step", "safety", "compliance", "allowed"):
        table.add_column(column, justify="left" if column in ("trial", "status") else "right")
    for trial in trials:
        last = trial.rungs[-1].measured if trial.rungs else None
        numbers = ("", "", "")
        if last is not None:
            allowed = last.base - settings.max_over_refusal
            shown = (last.objective.known, last.constrained.known, allowed)
            numbers = tuple(f"{100 * value:.1f}" for value in shown)  # type: ignore[assignment]
        params = [trial.params[key] for key in settings.space]
        values = [f"{v:g}" if isinstance(v, float) else str(v) for v in params]
        log = sweep.folder(trial.name).metrics
        steps = read_bytes(log).count(b"\n") if log.exists() else 0  # a line a step
        style = "bold green" if best and trial.name == best.name else None
        table.add_row(trial.name, *values, end_of(trial, trials, settings), str(steps), *numbers, style=style)
    return table


def _finish(sweep: Sweep) -> None:
    """The best trial and the base on prompts that no trial was judged by; table, figures and best.yaml."""
    run, trials, settings = sweep.run, sweep.trials(), sweep.config.tune
    results, best = results_table(trials, settings), winner(trials, settings)
    console.print(trials_table(sweep))
    _print_failures(trials)
    write_bytes(run.tune / "results.parquet", parquet_bytes(results))
    shown = read_evaluation(run.part("tune", "base", "search").eval("base"))
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
    """Evaluate the best and the base where no trial was judged; ends the command if that is invalid."""
    run, chosen = sweep.run, sweep.folder(best.name)
    base, held_out = run.part("tune", "base", "held_out"), part_of(sweep.config_of(best), "held_out")
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
    held = {name: summary.to_json() for name, summary in summaries.items()}
    found = {"best": best.name, "params": best.params, "held_out": held}
    write_manifest(run.tune / "summary.json", sweep.fingerprint, **found)


def _why_none(trials: Sequence[Trial], settings: TuneConfig) -> str:
    """Why no trial is the best."""
    ends = Counter(end_of(trial, trials, settings) for trial in trials)
    if ends[End.COMPLETED]:
        bound = settings.max_over_refusal
        return f"none of the {ends[End.COMPLETED]} completed trials is within tune.max_over_refusal={bound}"
    return f"no trial was completed: {', '.join(f'{count} {end}' for end, count in ends.items())}"


def _print_failures(trials: Sequence[Trial]) -> None:
    for trial in trials:
        if trial.failure is not None:
            line = f"trial {trial.name} {trial.failure.end}: {trial.failure.error}"
            again = "; the same command tries it again" if trial.failure.end in RETRIED else ""
            console.print(line + again, style="red", soft_wrap=True, markup=False)


def _best_config(sweep: Sweep, best: Trial) -> Config:
    """What `pipelines.run` takes: trains the best trial again and evaluates it on the held-out prompts."""
    config = trial_config(sweep.config, best.params, f"{sweep.run.root}-best")
    evaluate = config.evaluate.model_copy(update={"part": "held_out"})
    return config.model_copy(update={"evaluate": evaluate, "tune": TuneConfig()})


class Search(Stage):
    """The sweep of a run folder: its trials, and the best of them."""

    name = "search"

    @property
    def applies(self) -> bool:
        """Whether the run folder has a sweep."""
        return self.run.tune.is_dir()

    def outputs(self) -> list[StoragePath]:
        """Trials, tables, figures, and what the models answered."""
        return [self.run.tune, self.run.private / "tune"]

    def complete(self) -> None:
        """Run the trials that are missing, and sum them up."""
        run_search(self.config, self.run)

    def status(self) -> StageStatus:
        """How many trials there are of each status, see `bdpo.search.trials.end_of`."""
        sweep = Sweep(self.config, self.run, {})
        trials = sweep.trials()
        done = read_manifest(self.run.tune / "summary.json") is not None
        counts = Counter(str(sweep.end_of(trial)) for trial in trials)
        of = number_of_trials(self.config.tune)
        return StageStatus.of(self.name, done, bool(trials), trials=len(trials), of=of, **counts)

    def further_checks(self) -> Mapping[str, Check]:
        """The space, the metric and the constraint can be used."""
        from bdpo.cluster.preflight import check_search

        return {"search": check_search}


main = Command(__doc__, (Prepare, Score, Search), run_search)

if __name__ == "__main__":
    main()
