"""The sweep as its users run it: a command of its own, hurt on its way, and what it says is true."""

from __future__ import annotations

import json
import os

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from bdpo.config import load_config, parse_config
from bdpo.storage.run_dir import RunDir
from tests.support import ROOT
from tests.support.commands import kill_with_cluster
from tests.support.sweeps import RATES, start, sweep_config, wait_for

STEPS, RUNGS = 3, (2, 3)


SWEEP = """
import ray, tune.search as search
ray.init("local", num_cpus=3, log_to_driver=False, logging_level="ERROR")  # one short of two trials
search.main()
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
    for *sections, key in (
        ("model", "name_or_path"),
        ("data", "path"),
        ("evaluate", "strongreject", "path"),
        ("evaluate", "xstest", "path"),
    ):
        place = values
        for section in sections:
            place = place[section]
        place[key] = os.path.relpath(place[key], ROOT)
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
    wait_for(process, trials / "0001" / "train" / "recoveries.jsonl")  # the sweep itself continues
    kill_with_cluster(process)
    # A model moves on, and checkpoints go with the end of a trial.
    done = [file for file in trials.rglob("*.json") if not {"model", "train"} & set(file.parts)]
    kept = {file: file.stat().st_mtime_ns for file in done}
    assert len(kept) >= 4  # of the first trial its beginning and end, of the second a rung
    assert not list(trials.glob("*/rungs/000000003.json")), "killed too late"
    blocked = block(trials / "0001", 3)
    code, out, err = command(folder, "tune.max_failures=1")
    assert code == 1, err
    assert "trial 0001: lost: 2 times, at last IsADirectoryError" in out
    assert (trials / "0001" / "train" / "ray").is_dir(), "its checkpoints are gone"
    blocked.rmdir()
    code, out, err = command(folder)
    assert code == 0, err
    assert {file: file.stat().st_mtime_ns for file in kept} == kept, "what was done was done again"
    return folder, out


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
        assert "trial 0000: failed: FloatingPointError" in out

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
        for name, reported in (("base", run.search_base("held_out")), ("trained", best)):
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
