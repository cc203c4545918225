"""Trials in this process, without Ray: faults, judges that fail, and what a search refuses."""

from __future__ import annotations

import json
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bdpo.config import parse_config
from bdpo.config.derive import part_of
from bdpo.data.pairs import count_pairs
from bdpo.errors import UserError
from bdpo.reports.run import sweep_settings
from bdpo.scoring.scores import finish_scores, score_fingerprint
from bdpo.scoring.shard_scorer import ShardScorer
from bdpo.search.sweep import Sweep
from bdpo.search.trials import Rung
from bdpo.stats import Estimate
from bdpo.storage.manifests import read_manifest, write_manifest
from bdpo.storage.run_dir import RunDir
from bdpo.training.rungs import Rungs
from bdpo.variants.ends import End, Failure
from bdpo.variants.objective import Measured
from pipelines.evaluate import EvaluateBase, EvaluateTrained
from pipelines.prepare import Prepare
from pipelines.runtime.pool import InProcess
from tests.support.commands import run_command
from tests.support.fake_endpoint import FINE, fake_endpoint, honest, reply
from tests.support.helpers import save_model
from tests.support.sweeps import configured, sweep_config
from tune.trial import Trials

pytestmark = pytest.mark.long

STEPS, RUNGS = 3, (2, 3)

ALL = Estimate(1.0, 0.9, 1.0, 6, "exact")


def block(trial, step):
    """Have a folder where the scores of a rung are to be written: a fault of the storage."""
    folder = trial / "eval" / f"rung-{step}" / "scores.parquet"
    folder.mkdir(parents=True)
    return folder


def test_what_cannot_be_searched_is_said_before_anything_is_done(tmp_path, tiny_chat):
    (tmp_path / "config.yaml").write_text(sweep_config(tmp_path, tiny_chat).to_yaml())
    config = "--config", tmp_path / "config.yaml"
    done = run_command("tune.search", *config, "tune.metric=strongreject.x")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "tune.metric=strongreject.x: is not measured; requires one of strongreject.safety" in done.err
    assert not (tmp_path / "run" / "data").exists()


def test_the_table_names_the_measures_that_are_searched(tmp_path):
    tune = {"metric": "xstest.unsafe_refusal", "constraint": "simpleqa.correct"}
    sweep = Sweep(configured(**tune), RunDir(tmp_path), {})
    headings = [column.header for column in Trials(sweep, pa.table({})).table().columns]
    assert headings[-3:] == ["XSTest refusal, unsafe", "SimpleQA correct", "least allowed"]


class Begun:
    """A trial whose training is done: its actor, without Ray, has nothing left to do but to evaluate."""

    def __init__(self, config, chat):
        run = RunDir(config.run_dir)
        self.sweep = Sweep(config, run, {"seed": 0})
        base = run.search_base("search")
        EvaluateBase(part_of(config, "search"), base, executor=InProcess()).complete()
        self.base = pq.read_table(run.search_base("search").eval("base") / "scores.parquet")
        self.name = self.sweep.suggest().name
        self.folder = self.sweep.folder(self.name)
        save_model(self.folder.model, chat, seed=1)
        for step in RUNGS:
            Rungs(self.folder.root / "rungs", RUNGS).mark_exported(step)
        Prepare(config, run).complete()
        fingerprint = score_fingerprint(config, run)
        ShardScorer(config, run, fingerprint, "cpu")({"first": 0, "rows": count_pairs(run.pairs)})
        finish_scores(run, fingerprint, 0)
        self.begun = []

    def begins(self, kind, what, at_least=0.0):
        """What the actor reports."""
        self.begun.append((kind, at_least))

    def actor(self, name=None):
        """One that begins a trial, this one if no other is named."""
        from pipelines.runtime.variant_actor import VariantActor

        actor = object.__new__(VariantActor)  # its own Ray bookkeeping is of no interest here
        actor.setup({"variant": name or self.name}, Trials(self.sweep, self.base), self.begins)
        return actor

    def next_rung(self):
        """What Tune is told by an actor that begins the trial again."""
        return self.actor().step()

    @property
    def ended(self):
        """What Tune is told of the trial's end."""
        return {"variant": self.name, "done": True}

    @property
    def status(self):
        return self.sweep.end_of(self.sweep.trial(self.name))


def test_a_judge_that_goes_down_costs_no_answer_and_makes_no_score(tmp_path, tiny_chat):
    def down(handler, body):
        reply(handler, b"{}", 500)

    with fake_endpoint(honest(**FINE)) as endpoint:
        judge = {"judge": {"name": "rubric", "base_url": endpoint.url, "model": "fake", "retries": 0}}
        begun = Begun(sweep_config(tmp_path, tiny_chat, **judge), tiny_chat)
        endpoint.script = down
        assert begun.next_rung() == begun.ended
        [invalid] = begun.sweep.trials()
        assert begun.status == "invalid"
        assert invalid.rungs == []
        assert "is invalid, 2 of 2 unjudged (2 http_500)" in invalid.failure.error
        answered = {f: f.stat().st_mtime_ns for f in begun.folder.private.rglob("*.parquet")}

        endpoint.script = honest(**FINE)
        begun.sweep.reopen()
        assert not begun.next_rung()["done"]
        assert begun.sweep.trials()[0].rungs[0].step == RUNGS[0]
        assert {f: f.stat().st_mtime_ns for f in answered} == answered
        evaluate = begun.sweep.config.evaluate  # of a shard, 8 at a time, with three requests each
        judged, longest = f"judge rung-{RUNGS[0]}", evaluate.batch_size / 8 * 3 * 60
        assert begun.begun.count((judged, longest)) == 2, "verdicts are watched as answers are"


def test_a_fault_not_its_own_leaves_the_trial_to_the_next_actor(tmp_path, tiny_chat):
    begun = Begun(sweep_config(tmp_path, tiny_chat), tiny_chat)
    blocked = block(begun.folder.root, RUNGS[0])
    with pytest.raises(IsADirectoryError):
        begun.next_rung()
    assert begun.status == "open"
    blocked.rmdir()
    assert begun.next_rung() == begun.ended | {"done": False}


def test_a_fault_before_the_training_is_told_apart_as_one_in_it(tmp_path, tiny_chat):
    """Of an actor that does not come up, or cannot be taken over, Tune would begin the trial no more."""
    values = sweep_config(tmp_path, tiny_chat).model_dump()
    values["tune"] |= {"space": {"train.zero_stage": [0, 1], "train.offload": ["cpu"]}, "searcher": "random"}
    begun = Begun(parse_config(values, "test"), tiny_chat)
    begun.sweep.suggest()
    [mixed] = [t for t in begun.sweep.trials() if t.params["train.zero_stage"] == 0]
    [fine] = [t for t in begun.sweep.trials() if t.params["train.zero_stage"] == 1]
    file = begun.sweep.folder(fine.name).config
    file.mkdir(parents=True)  # a fault of the storage
    actor = begun.actor(fine.name)
    with pytest.raises(IsADirectoryError):
        actor.step()
    assert begun.sweep.end_of(fine) == "open"
    assert actor.reset_config({"variant": mixed.name})
    assert actor.step() == {"variant": mixed.name, "done": True}
    failure = begun.sweep.trial(mixed.name).failure
    assert failure.end == End.FAILED
    assert "offload=cpu requires zero_stage=1, 2 or 3" in failure.error


def test_what_cannot_be_tidied_of_one_trial_does_not_cost_the_next(tmp_path, tiny_chat, monkeypatch):
    begun = Begun(sweep_config(tmp_path, tiny_chat), tiny_chat)
    actor = begun.actor(begun.name)
    assert actor.step() == begun.ended | {"done": False}

    def cannot(sweep, name):
        raise OSError(5, "I/O error")

    monkeypatch.setattr(Sweep, "tidy", cannot)
    following = begun.sweep.suggest()
    begun.sweep.record_failure(following.name, Failure(End("failed"), "why"))
    assert actor.reset_config({"variant": following.name})
    assert actor.step() == {"variant": following.name, "done": True}
    actor.cleanup()


def test_held_out_verdicts_that_are_missing_are_no_result_and_asked_for_again(tmp_path, tiny_chat, capsys):
    from tune.search import _finish

    asked = []

    def down_for_the_best(handler, body):
        asked.append(body)
        reply(handler, b"{}", 500)

    with fake_endpoint(honest(**FINE)) as endpoint:
        judge = {"judge": {"name": "rubric", "base_url": endpoint.url, "model": "fake", "retries": 0}}
        begun = Begun(sweep_config(tmp_path, tiny_chat, **judge), tiny_chat)
        for step in RUNGS:
            shown = Measured(ALL, ALL, base=1.0, violation=0.0)
            begun.sweep.record_rung(begun.sweep.trial(begun.name), step, shown)
        held_out = part_of(begun.sweep.config_of(begun.sweep.trial(begun.name)), "held_out")
        base = begun.sweep.run.search_base("held_out")
        assert EvaluateBase(held_out, base, executor=InProcess()).complete().valid
        endpoint.script = down_for_the_best
        assert not EvaluateTrained(held_out, begun.folder, executor=InProcess()).complete().valid
        with pytest.raises(SystemExit) as ended:
            _finish(begun.sweep)
        assert ended.value.code == 1
        assert "the evaluation of best is invalid" in capsys.readouterr().out
        assert not (begun.sweep.run.tune / "summary.json").exists()

        missing, answered = len(asked) // 2, []  # asked twice already

        def up_again(handler, body):
            answered.append(body)
            honest(**FINE)(handler, body)

        endpoint.script = up_again
        _finish(begun.sweep)
        assert len(answered) == missing
        summary = json.loads((begun.sweep.run.tune / "summary.json").read_text())
        assert summary["best"] == begun.name
        assert summary["constraint"]["holds"] is True
        assert "On the held-out prompts the constraint holds" in capsys.readouterr().out


def test_the_order_of_the_space_is_a_part_of_the_sweep(tmp_path, tiny_chat):
    from tune.search import sweep_fingerprint

    values = sweep_config(tmp_path, tiny_chat).model_dump()
    keys = ["train.learning_rate", "method.alpha"]
    configs = [
        parse_config(values | {"tune": {"space": {key: [1.0, 2.0] for key in order}}}, "test")
        for order in (keys, keys[::-1])
    ]
    run = RunDir(configs[0].run_dir)
    Prepare(configs[0], run).complete()
    first, second = (sweep_fingerprint(config, run) for config in configs)
    Sweep(configs[0], run, first).begin()
    Sweep(configs[0], run, first).begin()
    with pytest.raises(UserError, match=r"made with tune.space=\['train.learning_rate', 'method.alpha'\]"):
        Sweep(configs[1], run, second).begin()
    for config, fingerprint in zip(configs, (first, second), strict=True):
        kept = json.loads(json.dumps(fingerprint, sort_keys=True))
        assert list(sweep_settings(kept).space.items()) == list(config.tune.space.items())


def test_the_keys_of_tune_in_the_fingerprint_are_those_of_searches_on_disk(tmp_path, tiny_chat):
    """How many trials there are, how many at a time and how often they are retried may change."""
    from tune.search import sweep_fingerprint

    config = sweep_config(tmp_path, tiny_chat)
    free = {"num_samples": 99, "max_concurrent_trials": 7, "max_failures": 5}
    more = config.model_copy(update={"tune": config.tune.model_copy(update=free)})
    run = RunDir(config.run_dir)
    Prepare(config, run).complete()
    fingerprint = sweep_fingerprint(config, run)
    assert sweep_fingerprint(more, run) == fingerprint
    assert {key for key in fingerprint if key.startswith("tune.")} == {
        *(f"tune.space.{key}" for key in config.tune.space),
        *("tune.space", "tune.searcher", "tune.metric", "tune.constraint", "tune.max_over_refusal"),
        *("tune.rungs", "tune.reduction_factor", "tune.rung_limit", "tune.max_broken"),
    }
    dimensions = config.model_dump()["tune"]["space"]
    assert [fingerprint[f"tune.space.{key}"] for key in config.tune.space] == list(dimensions.values())


def test_an_actor_that_dies_before_tune_knows_of_a_rung_changes_nothing(tmp_path, tiny_chat):
    """The next actor finds the rung recorded: it continues or ends, as the sweep's files record."""
    begun = Begun(sweep_config(tmp_path, tiny_chat), tiny_chat)
    assert [begun.next_rung()["done"] for _ in RUNGS] == [False, True]
    assert begun.status == "completed"
    assert begun.next_rung() == begun.ended
    first, last = sorted((begun.folder.root / "rungs").glob("*.json"))
    last.unlink()
    better = begun.sweep.suggest()
    shown = Measured(Estimate(2.0, 2.0, 2.0, 6, "t"), ALL, base=1.0, violation=0.0)
    rung = asdict(Rung(RUNGS[0], shown, finished=0.0))
    write_manifest(begun.sweep.folder(better.name).root / "rungs" / first.name, {}, **rung)
    recorded = read_manifest(first)
    write_manifest(first, recorded.fingerprint, **{**recorded, "before": [better.name]})
    assert begun.status == "stopped"
    assert begun.next_rung() == begun.ended
    assert not last.exists()
