"""The whole pipeline as a user runs it, on a local Ray cluster: results, reruns, repairs."""

from __future__ import annotations

import json
import shutil

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from bdpo.config import load_config
from bdpo.storage.paths import discard
from bdpo.storage.run_dir import RunDir
from pipelines.run import run_pipeline
from pipelines.runtime import pool
from pipelines.runtime.registry import PIPELINE
from pipelines.runtime.stage import outputs_of
from tests.support.commands import start_alone
from tests.support.pipeline import PAIRS, pipeline, pipeline_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_chat):
    return pipeline_inputs(tmp_path_factory.mktemp("inputs"), tiny_chat)


@pytest.fixture(scope="module")
def finished(inputs):
    """The whole pipeline, run once; returns what it printed."""
    process = start_alone("-m", "pipelines.run", "--config", inputs / "config.yaml")
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    return out


def snapshot(folder):
    """When every result was written."""
    files = [file for file in folder.rglob("*") if file.is_file() and "report" not in file.parts]
    return {str(file): file.stat().st_mtime_ns for file in files if file.name not in ("config.yaml", ".lock")}


def rows_of(shard):
    """Without the metadata, which say who scored it and how long it took."""
    return pq.read_table(shard).replace_schema_metadata(None)


def made_again(shard):
    """The shard that has now the rows of this one."""
    (again,) = shard.parent.glob(f"{shard.name[:14]}-*")
    return again


@pytest.mark.ray
class TestRun:
    def test_in_python_it_returns_the_results_and_prints_nothing(self, inputs, finished, capsys):
        """Of a finished run it makes nothing again; then it makes one evaluation that is missing."""
        config, run, before = load_config(inputs / "config.yaml"), inputs / "run", snapshot(inputs / "run")
        results = run_pipeline(config)
        assert snapshot(run) == before
        assert (results.folder, results.model) == (run, run / "model")
        assert list(results.evaluations) == ["base", "trained"]
        assert results.evaluations["trained"].summary.estimate("strongreject.safety").n == 2
        assert results.scores.num_rows == PAIRS
        discard(run / "eval" / "trained")
        assert run_pipeline(config).evaluations["trained"].scores == results.evaluations["trained"].scores
        assert capsys.readouterr().out == ""

    def test_every_result_is_there(self, inputs, finished):
        run = inputs / "run"
        assert sum(pq.read_metadata(shard).num_rows for shard in (run / "scores").glob("part-*")) == PAIRS
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
        for name in ("base", "trained"):
            assert json.loads((run / "eval" / name / "summary.json").read_text())["valid"]
            assert pq.read_table(run / "eval" / name / "scores.parquet").num_rows == 4
        summary = json.loads((run / "report" / "summary.json").read_text())
        assert summary["data"]["rows"] == PAIRS + 1
        assert summary["data"]["kept"] == PAIRS
        assert sum(summary["data"]["quarantined"].values()) == 1
        assert [row["pairs"] for row in summary["mi"]] == [PAIRS / 2, PAIRS / 2]
        assert (run / "report" / "mi.png").stat().st_size > 5000
        for shown in ("StrongReject", "XSTest", "unsafe", "22 kept", "seconds"):
            assert shown in finished

    def test_the_trained_model_loads_and_differs(self, inputs, finished):
        base = AutoModelForCausalLM.from_pretrained(inputs / "model").state_dict()
        trained = AutoModelForCausalLM.from_pretrained(inputs / "run" / "model").state_dict()
        assert any((base[name] != trained[name]).any() for name in base)

    def test_text_stays_private(self, inputs, finished):
        words = [word.encode() for word in ("amber", "basil", "cedar")]
        may_hold_text = {"pairs", "private", "model"}
        for file in (inputs / "run").rglob("*"):
            if file.is_file() and not may_hold_text & set(file.parts):
                assert not any(word in file.read_bytes() for word in words), file
        assert not any(word.decode() in finished for word in words)
        private = inputs / "run" / "private"
        assert private.stat().st_mode & 0o777 == 0o700
        assert all(file.stat().st_mode & 0o777 == 0o600 for file in private.rglob("*") if file.is_file())

    def test_the_same_command_again_does_nothing(self, inputs, finished, monkeypatch):
        before = snapshot(inputs / "run")
        monkeypatch.setattr(pool, "connect", lambda: pytest.fail("a finished run needs no cluster"))
        assert pipeline("run", inputs / "config.yaml").code == 0
        assert snapshot(inputs / "run") == before

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ("method.alpha=1.7", "method.alpha=1.5, now it is 1.7"),
            ("score.unconditional=bos", "unconditional=empty_turn, now it is bos"),
            ("data.limit=9", "data.limit=None, now it is 9"),
            ("seed=4", "seed=0, now it is 4"),
            ("evaluate.max_new_tokens=5", "evaluate.max_new_tokens=4, now it is 5"),
        ],
    )
    def test_results_of_another_config_are_refused_by_key(self, inputs, finished, change, named):
        before = snapshot(inputs / "run")
        done = pipeline("run", inputs / "config.yaml", change)
        assert done.code == 2
        assert named in done.err
        assert snapshot(inputs / "run") == before

    def test_scoring_after_a_kill_makes_only_the_missing_shard(self, inputs, finished, tmp_path):
        run = tmp_path / "run"
        shutil.copytree(inputs / "run", run)
        (run / "scores" / "manifest.json").unlink()
        lost = sorted((run / "scores").glob("part-*"))[1]
        scores = rows_of(lost)
        lost.write_bytes(lost.read_bytes()[:-1])
        before = snapshot(run / "scores")
        code, _, err = pipeline("score", inputs / "config.yaml", f"run_dir={run}")
        assert code == 0, err
        again = made_again(lost)
        assert rows_of(again).equals(scores)
        after = snapshot(run / "scores")
        assert {name for name in after if after[name] != before.get(name)} == {
            str(again),
            str(run / "scores" / "manifest.json"),
        }

    def test_a_shard_that_a_finished_run_lost_is_made_again(self, inputs, finished, tmp_path):
        run = tmp_path / "run"
        shutil.copytree(inputs / "run", run)
        lost = sorted((run / "scores").glob("part-*"))[-1]
        scores = rows_of(lost)
        lost.unlink()
        (run / "train" / "manifest.json").unlink()
        done = pipeline("train", inputs / "config.yaml", f"run_dir={run}")
        assert done.code == 2
        assert "no finished scores" in done.err
        code, _, err = pipeline("score", inputs / "config.yaml", f"run_dir={run}")
        assert code == 0, err
        assert rows_of(made_again(lost)).equals(scores)

    def test_a_model_that_a_finished_run_lost_is_exported_again(self, inputs, finished, tmp_path):
        run = tmp_path / "run"
        shutil.copytree(inputs / "run", run)
        shutil.rmtree(run / "model")
        (run / "eval" / "base" / "scores.parquet").unlink()
        code, _, err = pipeline("run", inputs / "config.yaml", f"run_dir={run}")
        assert code == 0, err
        weights = [folder / "model" / "model.safetensors" for folder in (run, inputs / "run")]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
        assert (run / "eval" / "base" / "scores.parquet").is_file()

    def test_a_typo_with_fresh_does_not_cost_the_run(self, inputs, finished):
        before = snapshot(inputs / "run")
        overrides = "fresh=true", "data.path=/nope.jsonl"
        assert pipeline("run", inputs / "config.yaml", *overrides).code == 2
        assert snapshot(inputs / "run") == before

    def test_fresh_discards_every_result(self, inputs, finished, tmp_path):
        run = RunDir(tmp_path / "run")
        shutil.copytree(inputs / "run", run.root)
        config = load_config(inputs / "config.yaml")
        discard(*outputs_of(stage(config, run) for stage in PIPELINE))
        left = {file.name for file in run.root.rglob("*") if file.is_file()}
        assert left == {"config.yaml", ".lock", "quarantine.jsonl"}

    def test_fresh_starts_over(self, inputs, finished, tmp_path):
        run = tmp_path / "run"
        shutil.copytree(inputs / "run", run)
        code, _, err = pipeline(
            "score", inputs / "config.yaml", f"run_dir={run}", "fresh=true", "score.unconditional=bos"
        )
        assert code == 0, err
        assert (
            json.loads((run / "scores" / "manifest.json").read_text())["fingerprint"]["unconditional"]
            == "bos"
        )


@pytest.mark.ray
def test_simpo_with_lora_runs_without_scores(inputs, tmp_path):
    run = tmp_path / "run"
    overrides = f"run_dir={run}", "method.name=simpo", "train.lora.r=4", "train.workers=1"
    code, out, err = pipeline("run", inputs / "config.yaml", *overrides)
    assert code == 0, err
    assert not (run / "scores").exists()
    assert "mutual information" not in out
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert summary["mi"] == []
    assert list(summary["seconds"]) == ["evaluate base", "train", "evaluate trained"]
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert (run / "model" / "model.safetensors").is_file()
