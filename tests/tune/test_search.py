"""The sweep as its users run it: a command of its own, hurt on its way, and what it says is true."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import asdict

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from bdpo.config import load_config, parse_config
from bdpo.config.derive import part_of
from bdpo.data.pairs import count_pairs
from bdpo.errors import UserError
from bdpo.reports.run import sweep_settings
from bdpo.scoring.scores import finish_scores, score_fingerprint
from bdpo.scoring.shard_scorer import ShardScorer
from bdpo.search.sweep import Sweep
from bdpo.search.trials import Rung
from bdpo.stats import Estimate
from bdpo.storage.manifests import write_manifest
from bdpo.storage.run_dir import RunDir
from bdpo.training.rungs import Rungs
from bdpo.variants.ends import End, Failure
from bdpo.variants.objective import Measured
from pipelines.evaluate import evaluate_model
from pipelines.prepare import run_prepare
from tests.support import ROOT
from tests.support.fake_endpoint import FINE, fake_endpoint, honest, reply
from tests.support.helpers import save_model
from tests.support.sweeps import RATES, start, sweep_config, wait_for

STEPS, RUNGS = 3, (2, 3)

ALL = Estimate(1.0, 0.9, 1.0, 6, "wilson")


SWEEP = """
import ray, tune.search as search
ray.init("local", num_cpus=3, log_to_driver=False, logging_level="ERROR")  # one short of two trials
search.main(search.run_search, "", search._results)
"""

# Counts, in every process, how often the reference model is asked: once a shard of the scoring, and no more.
COUNTER = """
import os, sys
from importlib.machinery import PathFinder

class Counting(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target) if name == "bdpo.scoring.reference" else None
        if spec:
            load = spec.loader.exec_module
            def counted(module):
                load(module)
                asked = module.reference_logps
                def reference_logps(*arguments):
                    with open(os.environ["COUNTED"], "a") as file:
                        file.write("asked\\n")
                    return asked(*arguments)
                module.reference_logps = reference_logps
            spec.loader.exec_module = counted
        return spec

sys.meta_path.insert(0, Counting)
"""


def from_root(config):
    """The same, with paths that hold in the folder where the command is given and nowhere else."""
    values = config.model_dump()
    for section, key in (
        ("model", "name_or_path"),
        ("data", "path"),
        ("evaluate", "strongreject_path"),
        ("evaluate", "xstest_path"),
    ):
        values[section][key] = os.path.relpath(values[section][key], ROOT)
    return parse_config(values, "test")


def command(folder, *overrides):
    """Run the sweep to its end; (exit code, stdout, stderr)."""
    process = start(folder, "-c", SWEEP, "--config", str(folder / "config.yaml"), *overrides)
    out, err = process.communicate(timeout=1200)
    return process.returncode, out, err


def kill_a_worker(process):
    """One training worker, as if the system had run out of memory."""
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if child.name().startswith("ray::RayTrainW")]
    assert len(workers) == 2
    workers[0].kill()


def block(trial, step):
    """Have a folder where the scores of a rung are to be written: a fault of the storage."""
    folder = trial / "eval" / f"rung-{step}" / "scores.parquet"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def swept(tmp_path_factory, tiny_chat):
    """A sweep that lost a worker, its driver, then its storage; (folder, what it printed at last)."""
    folder = tmp_path_factory.mktemp("swept")
    (folder / "sitecustomize.py").write_text(COUNTER)
    (folder / "config.yaml").write_text(from_root(sweep_config(folder, tiny_chat)).to_yaml())
    trials = folder / "run" / "tune" / "trials"
    process = start(folder, "-c", SWEEP, "--config", str(folder / "config.yaml"))
    wait_for(process, trials / "0001" / "rungs" / "000000002.exported")
    kill_a_worker(process)
    wait_for(process, trials / "0001" / "rungs" / "000000002.json")
    wait_for(process, trials / "0001" / "train" / "recoveries.jsonl")  # the sweep itself goes on
    process.send_signal(signal.SIGKILL)
    process.wait()
    # A model moves on, and checkpoints go with the end of a trial.
    done = [file for file in trials.rglob("*.json") if not {"model", "train"} & set(file.parts)]
    kept = {file: file.stat().st_mtime_ns for file in done}
    assert len(kept) >= 4  # of the first trial its beginning and end, of the second a rung
    assert not list(trials.glob("*/rungs/000000003.json")), "killed too late"
    time.sleep(3)  # the cluster dies with its driver
    blocked = block(trials / "0001", 3)
    code, out, err = command(folder, "tune.max_failures=1")
    assert code == 1, err
    assert "trial 0001 lost: 2 times, at last IsADirectoryError" in out
    assert (trials / "0001" / "train" / "ray").is_dir(), "its checkpoints are gone"
    blocked.rmdir()
    code, out, err = command(folder)
    assert code == 0, err
    assert {file: file.stat().st_mtime_ns for file in kept} == kept, "what was done was done again"
    return folder, out


@pytest.mark.ray
class TestSweep:
    def test_no_trial_is_lost_and_none_is_repeated(self, swept):
        folder, _ = swept
        rows = pq.read_table(folder / "run" / "tune" / "results.parquet").to_pylist()
        assert [row["train.learning_rate"] for row in rows] == RATES
        assert [row["status"] for row in rows] == ["failed", "completed"]
        assert [row["step"] for row in rows] == [None, STEPS]
        lines = (folder / "run" / "tune" / "trials" / "0001" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]

    def test_trials_of_two_workers_do_not_share_three_processors(self, swept):
        folder, out = swept
        assert "1 at the same time" in out
        trials = folder / "run" / "tune" / "trials"
        failed = (trials / "0000" / "failed.json").stat().st_mtime
        assert failed < json.loads((trials / "0001" / "trial.json").read_text())["begun"]

    def test_a_trial_that_cannot_be_trained_is_a_recorded_failure(self, swept):
        folder, out = swept
        rows = pq.read_table(folder / "run" / "tune" / "results.parquet").to_pylist()
        assert rows[0]["error"].startswith("FloatingPointError: the loss is not finite: pairs ")
        assert "trial 0000 failed: FloatingPointError" in out

    def test_the_reference_model_is_asked_by_the_scoring_alone(self, swept):
        folder, _ = swept
        shards = len(list((folder / "run" / "scores").glob("part-*")))
        assert (folder / "counted").read_text().splitlines() == ["asked"] * shards
        assert not list((folder / "run" / "tune").rglob("scores/part-*"))

    def test_the_best_config_gives_the_reported_numbers_again(self, swept):
        """By the pipeline, in one go: same weights bit by bit, same answers, same numbers."""
        folder, _ = swept
        run = RunDir(folder / "run")
        best = run.part("tune", "trials", "0001")
        process = start(folder, "-m", "pipelines.run", "--config", str(run.tune / "best.yaml"))
        _, err = process.communicate(timeout=1200)
        assert process.returncode == 0, err
        again = RunDir(load_config(run.tune / "best.yaml").run_dir)
        theirs, ours = (
            AutoModelForCausalLM.from_pretrained(model, dtype="float32").state_dict()
            for model in (best.model, again.model)
        )
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
        for name, reported in (("base", run.part("tune", "base", "held_out")), ("trained", best)):
            tables = [pq.read_table(r.eval(name) / "scores.parquet") for r in (reported, again)]
            assert tables[0].equals(tables[1])
            assert set(tables[0]["category"].to_pylist()) == {"b", "u", "contrast_u"}

    def test_the_same_command_again_does_nothing_and_another_space_is_refused(self, swept):
        folder, _ = swept
        run = RunDir(folder / "run")
        results = {f: f.stat().st_mtime_ns for f in run.root.rglob("*.json")} | {
            f: f.stat().st_mtime_ns for f in run.root.rglob("*.safetensors")
        }
        results.pop(run.tune / "begun.json")
        results.pop(run.tune / "summary.json")
        arguments = "-m", "tune.search", "--config", str(folder / "config.yaml")
        process = start(folder, *arguments)
        out, err = process.communicate(timeout=1200)
        assert process.returncode == 0, err
        assert "best      trial 0001: train.learning_rate=0.001" in out
        assert {f: f.stat().st_mtime_ns for f in results} == results
        process = start(folder, *arguments, "tune.space={train.learning_rate: [0.1]}")
        _, err = process.communicate(timeout=1200)
        assert process.returncode == 2
        line = err.strip().splitlines()[-1]
        assert "made with tune.space.train.learning_rate=[1e+30, 0.001], now it is [0.1]" in line

    def test_text_stays_private(self, swept):
        folder, out = swept
        words = [word.encode() for word in ("amber", "basil", "cedar")]
        for file in (folder / "run" / "tune").rglob("*"):
            if file.is_file():
                assert not any(word in file.read_bytes() for word in words), file
        assert not any(word.decode() in out for word in words)
        private = list((folder / "run" / "private" / "tune").rglob("*.parquet"))
        assert private
        assert all(file.stat().st_mode & 0o777 == 0o600 for file in private)


def test_what_cannot_be_searched_is_said_before_anything_is_done(tmp_path, tiny_chat):
    (tmp_path / "config.yaml").write_text(sweep_config(tmp_path, tiny_chat).to_yaml())
    process = start(
        tmp_path, "-m", "tune.search", "--config", str(tmp_path / "config.yaml"), "tune.metric=strongreject.x"
    )
    _, err = process.communicate(timeout=1200)
    assert process.returncode == 2
    assert err.count("\n") == 1
    assert "tune.metric=strongreject.x: is not measured; requires one of strongreject.safety" in err
    assert not (tmp_path / "run" / "data").exists()


class Begun:
    """A trial whose training is done: its actor, without Ray, has nothing left to do but to evaluate."""

    def __init__(self, config, chat):
        run = RunDir(config.run_dir)
        self.sweep = Sweep(config, run, {"seed": 0})
        evaluate_model(part_of(config, "search"), run.part("tune", "base", "search"), "base", here=True)
        self.base = pq.read_table(run.part("tune", "base", "search").eval("base") / "scores.parquet")
        self.name = self.sweep.suggest().name
        self.folder = self.sweep.folder(self.name)
        save_model(self.folder.model, chat, seed=1)
        for step in RUNGS:
            Rungs(self.folder.root / "rungs", RUNGS).mark_exported(step)
        run_prepare(config, run)
        fingerprint = score_fingerprint(config, run)
        ShardScorer(config, run, fingerprint, "cpu")({"first": 0, "rows": count_pairs(run.pairs)})
        finish_scores(run, fingerprint, 0)

    def actor(self, name=None):
        """One that begins a trial, this one if no other is named."""
        from tune.trial import TrialActor

        actor = object.__new__(TrialActor)  # its own Ray bookkeeping is of no interest here
        actor.setup({"trial": name or self.name}, self.sweep, self.base)
        return actor

    def next_rung(self):
        """What Tune is told by an actor that begins the trial again."""
        return self.actor().step()

    @property
    def status(self):
        return self.sweep.end_of(self.sweep.trial(self.name))


@pytest.mark.ray
def test_what_no_trial_fits_is_refused_before_anything_is_scored(tmp_path, tiny_chat):
    """Of a cluster with an autoscaler, as it may grow: no GPU is up, and the sums of two would do."""
    (tmp_path / "config.yaml").write_text(sweep_config(tmp_path, tiny_chat).to_yaml())
    types = {
        "head": {"resources": {"CPU": 0}},
        "gpus": {"max_workers": 1, "resources": {"CPU": 9, "GPU": 2}},
    }
    cluster = {"max_workers": 4, "head_node_type": "head", "available_node_types": types}
    (tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps(cluster))
    shares = "train.gpus_per_worker=0.7", "evaluate.gpus_per_worker=0.6"
    arguments = "-c", SWEEP, "--config", str(tmp_path / "config.yaml"), *shares
    process = start(tmp_path, *arguments, HOME=str(tmp_path))
    _, err = process.communicate(timeout=1200)
    assert process.returncode == 2, err
    line = err.strip().splitlines()[-1]
    assert "2 GPU (train.workers=2 x 0.7 + evaluate.gpus_per_worker=0.6), each share on one GPU" in line
    assert "1 x (9 CPU, 2 GPU)" in line
    assert not (tmp_path / "run" / "scores").exists()


def test_a_judge_that_goes_down_costs_no_answer_and_makes_no_score(tmp_path, tiny_chat):
    def down(handler, body):
        reply(handler, b"{}", 500)

    with fake_endpoint(honest(**FINE)) as endpoint:
        judge = {"judge": "rubric", "judge_base_url": endpoint.url, "judge_model": "fake", "judge_retries": 0}
        begun = Begun(sweep_config(tmp_path, tiny_chat, **judge), tiny_chat)
        endpoint.script = down
        assert begun.next_rung() == {"done": True}
        [invalid] = begun.sweep.trials()
        assert begun.status == "invalid"
        assert invalid.rungs == []
        assert "is invalid, 2 of 2 unjudged (2 http_500)" in invalid.failure.error
        answered = {f: f.stat().st_mtime_ns for f in begun.folder.private.rglob("*.parquet")}

        endpoint.script = honest(**FINE)
        begun.sweep.reopen()
        assert begun.next_rung()["score"] == begun.sweep.trials()[0].rungs[0].measured.score
        assert {f: f.stat().st_mtime_ns for f in answered} == answered


def test_a_fault_not_its_own_leaves_the_trial_to_the_next_actor(tmp_path, tiny_chat):
    begun = Begun(sweep_config(tmp_path, tiny_chat), tiny_chat)
    blocked = block(begun.folder.root, RUNGS[0])
    with pytest.raises(IsADirectoryError):
        begun.next_rung()
    assert begun.status == "open"
    blocked.rmdir()
    assert begun.next_rung()["rung"] == 0


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
    assert actor.reset_config({"trial": mixed.name})
    assert actor.step() == {"done": True}
    failure = begun.sweep.trial(mixed.name).failure
    assert failure.end == End.FAILED
    assert "offload=cpu requires zero_stage=1, 2 or 3" in failure.error


def test_what_cannot_be_tidied_of_one_trial_does_not_cost_the_next(tmp_path, tiny_chat, monkeypatch):
    begun = Begun(sweep_config(tmp_path, tiny_chat), tiny_chat)
    actor = begun.actor(begun.name)
    assert actor.step()["rung"] == 0

    def cannot(sweep, name):
        raise OSError(5, "I/O error")

    monkeypatch.setattr(Sweep, "tidy", cannot)
    following = begun.sweep.suggest()
    begun.sweep.record_failure(following.name, Failure(End("failed"), "why"))
    assert actor.reset_config({"trial": following.name})
    assert actor.step() == {"trial": following.name, "done": True}
    actor.cleanup()


def test_held_out_verdicts_that_are_missing_are_no_result_and_asked_for_again(tmp_path, tiny_chat, capsys):
    from tune.search import _finish

    asked = []

    def down_for_the_best(handler, body):
        asked.append(body)
        reply(handler, b"{}", 500)

    with fake_endpoint(honest(**FINE)) as endpoint:
        judge = {"judge": "rubric", "judge_base_url": endpoint.url, "judge_model": "fake", "judge_retries": 0}
        begun = Begun(sweep_config(tmp_path, tiny_chat, **judge), tiny_chat)
        for step in RUNGS:
            shown = Measured(ALL, ALL, base=1.0, violation=0.0)
            begun.sweep.record_rung(begun.sweep.trial(begun.name), step, shown)
        held_out = part_of(begun.sweep.config_of(begun.sweep.trial(begun.name)), "held_out")
        base = begun.sweep.run.part("tune", "base", "held_out")
        assert evaluate_model(held_out, base, "base", here=True).valid
        endpoint.script = down_for_the_best
        assert not evaluate_model(held_out, begun.folder, "trained", here=True).valid
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
        assert json.loads((begun.sweep.run.tune / "summary.json").read_text())["best"] == begun.name


def test_the_order_of_the_space_is_a_part_of_the_sweep(tmp_path, tiny_chat):
    from tune.search import sweep_fingerprint

    values = sweep_config(tmp_path, tiny_chat).model_dump()
    keys = ["train.learning_rate", "method.alpha"]
    configs = [
        parse_config(values | {"tune": {"space": {key: [1.0, 2.0] for key in order}}}, "test")
        for order in (keys, keys[::-1])
    ]
    run = RunDir(configs[0].run_dir)
    run_prepare(configs[0], run)
    first, second = (sweep_fingerprint(config, run) for config in configs)
    Sweep(configs[0], run, first).begin()
    Sweep(configs[0], run, first).begin()
    with pytest.raises(UserError, match=r"made with tune.space=\['train.learning_rate', 'method.alpha'\]"):
        Sweep(configs[1], run, second).begin()
    for config, fingerprint in zip(configs, (first, second), strict=True):
        kept = json.loads(json.dumps(fingerprint, sort_keys=True))
        assert list(sweep_settings(kept).space.items()) == list(config.tune.space.items())


def test_an_actor_that_dies_before_tune_knows_of_a_rung_changes_nothing(tmp_path, tiny_chat):
    """The next actor finds the rung recorded: it goes on, or it ends, as the sweep's files say."""
    begun = Begun(sweep_config(tmp_path, tiny_chat), tiny_chat)
    assert [begun.next_rung()["rung"] for _ in RUNGS] == [0, 1]
    ended = {"trial": begun.name, "done": True}
    assert begun.status == "completed"
    assert begun.next_rung() == ended
    first, last = sorted((begun.folder.root / "rungs").glob("*.json"))
    last.unlink()
    better = begun.sweep.suggest()
    shown = Measured(Estimate(2.0, 2.0, 2.0, 6, "t"), ALL, base=1.0, violation=0.0)
    rung = asdict(Rung(RUNGS[0], shown, finished=0.0))
    write_manifest(begun.sweep.folder(better.name).root / "rungs" / first.name, {}, **rung)
    first.write_text(json.dumps(json.loads(first.read_text()) | {"before": [better.name]}))
    assert begun.status == "stopped"
    assert begun.next_rung() == ended
    assert not last.exists()
