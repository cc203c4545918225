"""The commands, as a user runs them: the real pipeline on a local Ray cluster, and every bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import yaml
from transformers import AutoModelForCausalLM

from bdpo.storage.paths import discard
from bdpo.storage.run_dir import RunDir
from pipelines.prepare import run_prepare
from pipelines.run import run_all
from pipelines.runtime import cli, pool
from pipelines.score import run_score
from pipelines.train import run_train
from tests.support import ROOT
from tests.support.helpers import invented_pairs, save_model, tiny_config, write_jsonl

PAIRS = 22


def command(stage, config_file, *overrides):
    """Run `python -m pipelines.<stage>`; returns (exit code, stdout, stderr)."""
    arguments = [sys.executable, "-m", f"pipelines.{stage}", "--config", str(config_file), *overrides]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_chat):
    """A model folder, pairs, two benchmarks, and the config file that names them."""
    folder = tmp_path_factory.mktemp("inputs")
    strongreject, xstest = folder / "strongreject.csv", folder / "xstest.csv"
    strongreject.write_text("category,source,forbidden_prompt\na,x,take the amber\nb,x,hide the fern\n")
    xstest.write_text(
        "id,prompt,type,label,focus,note\n1,plant a fern,t,safe,,\n2,burn a fern,contrast_t,unsafe,,\n"
    )
    config = tiny_config(
        folder / "run",
        save_model(folder / "model", tiny_chat),
        write_jsonl(
            folder / "pairs.jsonl", [*invented_pairs(PAIRS), {"prompt": "x", "chosen": None, "rejected": "y"}]
        ),
        train={"workers": 2},
        score={"workers": [1, 2]},
        evaluate={"strongreject_path": str(strongreject), "xstest_path": str(xstest)},
    )
    (folder / "config.yaml").write_text(config.to_yaml())
    return folder


@pytest.fixture(scope="module")
def finished(inputs):
    """The whole pipeline, run once; returns what it printed."""
    code, out, err = command("run", inputs / "config.yaml")
    assert code == 0, err
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
        assert in_process(run_all, inputs / "config.yaml", monkeypatch) == 0
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
    def test_results_of_another_config_are_refused_by_key(
        self, inputs, finished, monkeypatch, capsys, change, named
    ):
        before = snapshot(inputs / "run")
        assert in_process(run_all, inputs / "config.yaml", monkeypatch, change) == 2
        assert named in capsys.readouterr().err
        assert snapshot(inputs / "run") == before

    def test_scoring_after_a_kill_makes_only_the_missing_shard(self, inputs, finished, tmp_path):
        run = tmp_path / "run"
        shutil.copytree(inputs / "run", run)
        (run / "scores" / "manifest.json").unlink()
        lost = sorted((run / "scores").glob("part-*"))[1]
        scores = rows_of(lost)
        lost.write_bytes(lost.read_bytes()[:-1])
        before = snapshot(run / "scores")
        code, _, err = command("score", inputs / "config.yaml", f"run_dir={run}")
        assert code == 0, err
        again = made_again(lost)
        assert rows_of(again).equals(scores)
        after = snapshot(run / "scores")
        assert {name for name in after if after[name] != before.get(name)} == {
            str(again),
            str(run / "scores" / "manifest.json"),
        }

    def test_a_shard_that_a_finished_run_lost_is_made_again(
        self, inputs, finished, tmp_path, monkeypatch, capsys
    ):
        run = tmp_path / "run"
        shutil.copytree(inputs / "run", run)
        lost = sorted((run / "scores").glob("part-*"))[-1]
        scores = rows_of(lost)
        lost.unlink()
        (run / "train" / "manifest.json").unlink()
        assert in_process(run_train, inputs / "config.yaml", monkeypatch, f"run_dir={run}") == 2
        assert "no finished scores" in capsys.readouterr().err
        code, _, err = command("score", inputs / "config.yaml", f"run_dir={run}")
        assert code == 0, err
        assert rows_of(made_again(lost)).equals(scores)

    def test_a_model_that_a_finished_run_lost_is_exported_again(self, inputs, finished, tmp_path):
        run = tmp_path / "run"
        shutil.copytree(inputs / "run", run)
        shutil.rmtree(run / "model")
        (run / "eval" / "base" / "scores.parquet").unlink()
        code, _, err = command("run", inputs / "config.yaml", f"run_dir={run}")
        assert code == 0, err
        weights = [folder / "model" / "model.safetensors" for folder in (run, inputs / "run")]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
        assert (run / "eval" / "base" / "scores.parquet").is_file()

    def test_a_typo_with_fresh_does_not_cost_the_run(self, inputs, finished, monkeypatch):
        before = snapshot(inputs / "run")
        overrides = "fresh=true", "data.path=/nope.jsonl"
        assert in_process(run_all, inputs / "config.yaml", monkeypatch, *overrides) == 2
        assert snapshot(inputs / "run") == before

    def test_fresh_discards_every_result(self, inputs, finished, tmp_path):
        run = RunDir(tmp_path / "run")
        shutil.copytree(inputs / "run", run.root)
        discard(*run.results())
        left = {file.name for file in run.root.rglob("*") if file.is_file()}
        assert left == {"config.yaml", ".lock", "quarantine.jsonl"}

    def test_fresh_starts_over(self, inputs, finished, tmp_path):
        run = tmp_path / "run"
        shutil.copytree(inputs / "run", run)
        code, _, err = command(
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
    code, out, err = command("run", inputs / "config.yaml", *overrides)
    assert code == 0, err
    assert not (run / "scores").exists()
    assert "mutual information" not in out
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert summary["mi"] == []
    assert list(summary["seconds"]) == ["evaluate base", "train", "evaluate trained"]
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert (run / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("stage", [run_all, run_train], ids=["run", "train"])
def test_a_method_that_lacks_its_labels_is_refused_before_ray_starts(
    inputs, tmp_path, monkeypatch, capsys, stage
):
    rows = [row | {"rejected_safe": None} if i < 4 else row for i, row in enumerate(invented_pairs(PAIRS))]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    for module in ("run", "score", "train"):
        monkeypatch.setattr(
            f"pipelines.{module}.connect", lambda: pytest.fail("Ray is started"), raising=False
        )
    overrides = f"run_dir={tmp_path / 'run'}", f"data.path={data}", "method.name=safedpo"
    if stage is run_train:
        assert in_process(run_prepare, inputs / "config.yaml", monkeypatch, *overrides[:2]) == 0
    assert in_process(stage, inputs / "config.yaml", monkeypatch, *overrides) == 2
    error = capsys.readouterr().err
    assert f"method.name=safedpo: requires chosen_safe and rejected_safe of every pair, 4 of {PAIRS}" in error
    assert error.count("\n") == 1


def in_process(stage, config_file, monkeypatch, *overrides):
    """The command without a process of its own; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["pipelines", "--config", str(config_file), *overrides])
    try:
        cli.main(stage, "", RunDir.results)
    except SystemExit as end:
        return end.code
    return 0


class TestBadInput:
    """One line that names file, row, column or key; exit code 2; nothing taken for finished."""

    @pytest.fixture
    def refused(self, inputs, tmp_path, monkeypatch, capsys):
        def run(*overrides, config_file=inputs / "config.yaml"):
            code = in_process(run_score, config_file, monkeypatch, f"run_dir={tmp_path / 'run'}", *overrides)
            error = capsys.readouterr().err
            assert code == 2, error
            assert error.startswith("error: ")
            assert error.count("\n") == 1
            assert "Traceback" not in error
            assert not list(tmp_path.rglob("manifest.json"))
            assert not list(tmp_path.rglob("*.parquet"))
            return error

        return run

    def test_no_config_file(self, refused, tmp_path):
        assert "no.yaml" in refused(config_file=tmp_path / "no.yaml")

    def test_unknown_key(self, refused):
        assert "method.alhpa; did you mean method.alpha?" in refused("method.alhpa=1")

    def test_misspelt_section(self, refused, inputs, tmp_path):
        values = yaml.safe_load((inputs / "config.yaml").read_text())
        values["trian"] = values.pop("train")
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        assert "trian; did you mean train?" in refused(config_file=tmp_path / "config.yaml")

    @pytest.mark.parametrize(
        ("name", "content", "named"),
        [
            ("pairs.jsonl", b"", "empty"),
            ("pairs.json", b"[{]", "pairs.json"),
            ("pairs.csv", b"question,answer\na,b\n", "columns 2 unknown"),
            ("pairs.txt", b"chosen", "pairs.txt"),
            ("pairs.json", b'[{"prompt": "\xff"}]', "UTF-8"),
            ("pairs.jsonl", b'{"prompt": "a", "chosen": 3, "rejected": "b"}\n', "row 1"),
            ("pairs.jsonl", b'{"prompt": "a", "chosen": null, "rejected": "b"}\n', "chosen: null"),
        ],
    )
    def test_data_files(self, refused, tmp_path, name, content, named):
        (tmp_path / name).write_bytes(content)
        assert named in refused(f"data.path={tmp_path / name}")

    def test_no_data_file(self, refused, tmp_path):
        assert "gone.jsonl" in refused(f"data.path={tmp_path / 'gone.jsonl'}")

    def test_model_folder_without_weights(self, refused, inputs, tmp_path):
        shutil.copytree(inputs / "model", tmp_path / "model")
        (tmp_path / "model" / "model.safetensors").unlink()
        assert "no *.safetensors weights" in refused(f"model.name_or_path={tmp_path / 'model'}")

    def test_truncated_weights(self, refused, inputs, tmp_path):
        shutil.copytree(inputs / "model", tmp_path / "model")
        weights = tmp_path / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-9])
        assert "damaged weights" in refused(f"model.name_or_path={tmp_path / 'model'}")

    def test_negative_seed(self, refused):
        assert "key seed" in refused("seed=-1")

    def test_tokenizer_without_chat_template(self, refused, inputs, tmp_path):
        shutil.copytree(inputs / "model", tmp_path / "model")
        (tmp_path / "model" / "chat_template.jinja").unlink()
        error = refused(f"model.name_or_path={tmp_path / 'model'}")
        assert "no chat template; set model.chat_template" in error


@pytest.mark.ray
def test_a_cluster_that_is_too_small_is_said_at_once(inputs, tmp_path):
    code, _, err = command(
        "score", inputs / "config.yaml", f"run_dir={tmp_path / 'run'}", "score.workers=999"
    )
    assert code == 2
    assert "999 workers x 1 CPU do not fit" in err.splitlines()[-1]


@pytest.mark.parametrize("stage", ["score", "train", "evaluate", "run", "tiny_model"])
def test_help_says_what_the_command_is_for(stage):
    arguments = [sys.executable, "-m", f"pipelines.{stage}", "--help"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "python -m pipelines." in done.stdout


def test_training_before_scoring_says_what_to_run(inputs, tmp_path):
    code, _, err = command("train", inputs / "config.yaml", f"run_dir={tmp_path / 'run'}")
    assert code == 2
    assert err.splitlines()[-1].endswith("run `python -m pipelines.score` first")
