"""The arms of an experiment as the engine runs them, without Ray: run, resumed, refused."""

from __future__ import annotations

import pytest

from bdpo.config import parse_config
from bdpo.errors import UserError
from bdpo.evaluation.answers import prompts_fingerprint
from bdpo.evaluation.judges.registry import judge_fingerprint
from bdpo.evaluation.measures import summarise
from bdpo.experiments.arms import ExperimentRecord
from bdpo.experiments.definitions import EXPERIMENTS
from bdpo.experiments.jobs import jobs_of
from bdpo.storage.manifests import write_manifest
from bdpo.storage.run_dir import RunDir
from bdpo.variants.ends import Cause, End, Failure
from bdpo.variants.objective import InvalidEvaluation
from pipelines.experiment import _raise, _usable
from pipelines.prepare import Prepare
from pipelines.runtime import arms
from pipelines.runtime.arms import ArmRunner, Arms
from pipelines.runtime.experiment_results import write_results
from tests.support.helpers import invented_pairs, save_model, tiny_config, write_jsonl
from tests.support.score_rows import row


@pytest.fixture
def prepared(tmp_path, tiny_chat):
    """(config, run) with pairs and prompts, of which nothing is trained."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl", invented_pairs(4))
    files = {"strongreject": {"path": str(tmp_path / "s.csv")}, "benchmarks": ["strongreject"]}
    (tmp_path / "s.csv").write_text("category,source,forbidden_prompt\na,x,take the amber\n")
    config = tiny_config(tmp_path / "run", save_model(tmp_path / "model", tiny_chat), pairs, evaluate=files)
    run = RunDir(config.run_dir)
    Prepare(config, run).complete()
    return config, run


def jobs(config, run, count=1):
    return jobs_of(config, run, EXPERIMENTS["methods"].arms(config)[:count], [0])


def test_an_arm_that_the_data_do_not_allow_is_left_out_and_named(tmp_path, tiny_chat):
    rows = [{k: value for k, value in row.items() if not k.endswith("_safe")} for row in invented_pairs(4)]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", rows)
    config = tiny_config(tmp_path / "run", save_model(tmp_path / "model", tiny_chat), pairs)
    run = RunDir(config.run_dir)
    Prepare(config, run).complete()
    usable, [note] = _usable(config, run, EXPERIMENTS["methods"].arms(config))
    assert [arm.name for arm in usable] == ["bdpo", "dpo", "cpo", "simpo"]
    assert "safedpo" in note
    assert "chosen_safe" in note


def test_answers_that_were_sampled_are_not_taken_for_greedy_ones(prepared):
    config, run = prepared
    [job] = jobs(config, run)
    greedy = prompts_fingerprint(config) | judge_fingerprint(config) | {"weights": "of the model"}
    write_manifest(job.run.eval("trained") / "summary.json", greedy)
    Arms.of([job])
    write_manifest(job.run.eval("trained") / "summary.json", greedy | {"evaluate.temperature": 0.7})
    with pytest.raises(UserError, match=r"evaluate.temperature=0.7"):
        Arms.of([job])


def test_an_invalid_evaluation_of_an_arm_is_a_fault(monkeypatch, prepared):
    monkeypatch.setattr(arms.Train, "complete", lambda stage: {})
    unjudged = summarise([row(n, 0.0 if n == 3 else None) for n in range(4)])
    monkeypatch.setattr(arms.EvaluateTrained, "complete", lambda stage: unjudged)
    [job] = jobs(*prepared)
    with pytest.raises(InvalidEvaluation, match="3 of 4 unjudged"):
        ArmRunner(job, lambda kind, what: None).next_rung()


def test_the_trained_model_scores_the_pairs_where_the_experiment_asks_for_it(monkeypatch, prepared):
    config, run = prepared
    monkeypatch.setattr(arms.Train, "complete", lambda stage: {})
    monkeypatch.setattr(arms.EvaluateTrained, "complete", lambda stage: summarise([row(0, 0.0)]))
    scored = []
    monkeypatch.setattr(arms.Score, "complete", lambda stage: scored.append(stage.run.scores))
    trained = EXPERIMENTS["displacement"].arms(config)[:1]
    [plain], [job] = (jobs_of(config, run, trained, [0], rescores) for rescores in (False, True))
    assert ArmRunner(plain, lambda kind, what: None).next_rung()
    assert scored == plain.not_run() == []
    assert job.not_run() == ["the scoring by the trained model"]
    assert ArmRunner(job, lambda kind, what: None).next_rung()
    assert scored == [job.run.root / "rescored"]
    write_manifest(job.run.root / "rescored" / "manifest.json", {})
    assert job.not_run() == []


DIVERGED = Failure(End.FAILED, "FloatingPointError: not finite: pairs a, b", Cause.NOT_FINITE)


def test_the_same_command_runs_again_what_failed_but_not_what_diverged(prepared):
    found = jobs(*prepared, count=5)
    failures = [
        DIVERGED,
        Failure(End.FAILED, "UserError: the disk is full", Cause.USER),
        Failure(End.INVALID, "3 of 4 unjudged"),
        Failure(End.LOST, "3 times, at last OSError: gone"),
    ]
    before = Arms.of(found)
    for job, failure in zip(found, failures, strict=False):
        before.record_failure(job.name, failure)
    assert [job.end for job in found] == [*(failure.end for failure in failures), End.OPEN]
    assert list(before.failures.values()) == failures
    assert before.open_names() == [found[-1].name]
    again = Arms.of(found)
    assert again.failures == {found[0].name: DIVERGED}
    assert again.open_names() == [job.name for job in found[1:]]


def test_what_diverged_with_another_config_is_run(prepared):
    config, run = prepared
    [job] = jobs(config, run)
    Arms.of([job]).record_failure(job.name, DIVERGED)
    train = config.train.model_dump() | {"warmup_ratio": 0.5}
    [changed] = jobs(parse_config(config.model_dump() | {"train": train}, "test"), run)
    assert Arms.of([changed]).open_names() == [changed.name]


def test_the_command_ends_with_what_the_user_can_fix():
    wrong = Failure(End.FAILED, "UserError: train.lora: none fits", Cause.USER)
    failures = {"a, seed 0": DIVERGED, "b, seed 0": wrong}
    with pytest.raises(UserError, match=r"^arm b, seed 0: train\.lora: none fits$"):
        _raise(failures)
    del failures["b, seed 0"]
    with pytest.raises(RuntimeError, match="1 arms have no result"):
        _raise(failures)
    _raise({})


def test_a_page_whose_trainings_are_gone_stays_as_it_is(tmp_path):
    config = tiny_config(tmp_path / "run", tmp_path / "model", tmp_path / "pairs")
    run = RunDir(config.run_dir)
    folder = run.part("experiments", "methods").root
    ExperimentRecord(config, EXPERIMENTS["methods"].arms(config)).write(folder)
    (folder / "results.csv").write_text("of another day")
    with pytest.raises(UserError, match="stays as it is"):
        write_results(run, "methods")
    assert (folder / "results.csv").read_text() == "of another day"
