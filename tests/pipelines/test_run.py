"""What the commands refuse, in one line, and that they do so before Ray starts."""

from __future__ import annotations

import shutil

import pytest
import yaml

from bdpo.config import load_config
from bdpo.errors import UserError
from bdpo.storage.run_dir import RunDir
from pipelines.prepare import Prepare
from pipelines.run import run_pipeline
from pipelines.runtime.progress import console
from tests.support.commands import run_command
from tests.support.helpers import invented_pairs, write_jsonl
from tests.support.pipeline import PAIRS, pipeline, pipeline_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_chat):
    return pipeline_inputs(tmp_path_factory.mktemp("inputs"), tiny_chat)


@pytest.mark.parametrize("stage", ["run", "train"])
def test_a_method_that_lacks_its_labels_is_refused_before_ray_starts(inputs, tmp_path, monkeypatch, stage):
    rows = [row | {"rejected_safe": None} if i < 4 else row for i, row in enumerate(invented_pairs(PAIRS))]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    joined = "pipelines.runtime.cluster.refuse_secrets"  # the last that `connect` does
    monkeypatch.setattr(joined, lambda *_: pytest.fail("a cluster is joined"))
    overrides = f"run_dir={tmp_path / 'run'}", f"data.path={data}", "method.name=safedpo"
    if stage == "train":
        config = load_config(inputs / "config.yaml", overrides[:2])
        with RunDir(config.run_dir).open(config):
            Prepare(config, RunDir(config.run_dir)).complete()
    code, _, error = pipeline(stage, inputs / "config.yaml", *overrides)
    assert code == 2
    assert f"method.name=safedpo: requires chosen_safe and rejected_safe of every pair, 4 of {PAIRS}" in error
    assert error.count("\n") == 1


def test_in_python_wrong_input_is_an_exception_and_nothing_is_printed(inputs, tmp_path, capfd):
    """No SystemExit, and the terminal is as it was afterwards."""
    overrides = [f"run_dir={tmp_path / 'run'}", f"data.path={tmp_path / 'gone.jsonl'}"]
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        run_pipeline(load_config(inputs / "config.yaml", overrides))
    assert capfd.readouterr() == ("", "")
    assert not console.quiet


class TestBadInput:
    """One line that names file, row, column or key; exit code 2; nothing taken for finished."""

    @pytest.fixture
    def refused(self, inputs, tmp_path):
        def run(*overrides, config_file=inputs / "config.yaml"):
            code, _, error = pipeline("score", config_file, f"run_dir={tmp_path / 'run'}", *overrides)
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
            ("pairs.csv", b"question,answer\na,b\n", "columns question,1 unknown"),
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


@pytest.mark.parametrize("stage", ["score", "train", "evaluate", "run", "tiny_model"])
def test_help_says_what_the_command_is_for(stage):
    done = run_command(f"pipelines.{stage}", "--help")
    assert done.code == 0
    assert "python -m pipelines." in done.out


def test_training_before_scoring_says_what_to_run(inputs, tmp_path):
    config = "--config", inputs / "config.yaml"
    done = run_command("pipelines.train", *config, f"run_dir={tmp_path / 'run'}")
    assert done.code == 2
    assert done.err.splitlines()[-1].endswith("run `python -m pipelines.score` first")


@pytest.mark.ray
def test_a_cluster_that_is_too_small_is_said_at_once(inputs, tmp_path):
    code, _, err = pipeline(
        "score", inputs / "config.yaml", f"run_dir={tmp_path / 'run'}", "score.workers=999"
    )
    assert code == 2
    assert "999 workers x 1 CPU do not fit" in err.splitlines()[-1]
