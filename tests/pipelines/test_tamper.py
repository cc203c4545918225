"""The tamper test: the aligned model is trained further in its own folder, and evaluated beside itself."""

from __future__ import annotations

import shutil

import pytest

from bdpo.config import load_config
from bdpo.config.derive import tampering_config
from tests.support.commands import run_command
from tests.support.helpers import invented_pairs, save_model, write_jsonl
from tests.support.pipeline import TAMPER_SETTINGS, TAMPER_STEPS, pipeline_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_chat):
    """What a run is made from, with a second model that stands for the aligned one."""
    folder = pipeline_inputs(tmp_path_factory.mktemp("inputs"), tiny_chat)
    save_model(folder / "aligned", tiny_chat, seed=1)
    return folder


def tamper(inputs, folder, *overrides):
    return run_command(
        "pipelines.tamper", "--config", inputs / "config.yaml", f"run_dir={folder}", *overrides
    )


def test_its_training_is_that_of_the_section(inputs, tmp_path):
    overrides = [
        f"run_dir={tmp_path / 'run'}",
        *TAMPER_SETTINGS,
        "train.eval_fraction=0.5",
        "train.warmup_ratio=0.5",
    ]
    config = load_config(inputs / "config.yaml", [*overrides, "data.select.ches=[0,0.5]"])
    made = tampering_config(config, config.tamper, "aligned", "folder")
    assert (made.method.name, made.model.name_or_path, made.run_dir) == ("sft", "aligned", "folder")
    assert (made.train.max_steps, made.train.learning_rate, made.train.lora.r) == (TAMPER_STEPS, 0.01, 16)
    assert (made.train.eval_fraction, made.train.warmup_ratio) == (0, 0)
    assert made.data.select.model_dump() == {"group": "safe", "mi_difference": None, "ches": None}
    named = config.model_copy(update={"tamper": config.tamper.model_validate({"data": {"path": "other"}})})
    made = tampering_config(named, named.tamper, "aligned", "folder")
    assert [source.path for source in made.data.sources()] == ["other"]
    assert (made.data.select, made.data.max_length) == (None, config.data.max_length)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tamper.data.path=gone.jsonl", "tamper.data.path=gone.jsonl: no such file or folder"),
        ("tamper.data={path: PAIRS, format: hh_rlfh}", "tamper.data.format=hh_rlfh: unknown format"),
        ("tamper.lora.target_modules=[nothing]", "tamper.lora.target_modules=['nothing']"),
        ("tamper.steps=0", "key tamper.steps"),
        ("tamper.stepz=1", "tamper.stepz; did you mean tamper.steps?"),
    ],
)
def test_what_is_wrong_is_named_by_its_own_key_before_anything_is_done(inputs, tmp_path, override, message):
    run = tmp_path / "run"
    shutil.copytree(inputs / "aligned", run / "model")
    (run / "config.yaml").write_text("")
    done = tamper(inputs, run, override.replace("PAIRS", str(inputs / "pairs.jsonl")))
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert message in done.err
    assert not list(run.rglob("manifest.json"))


def test_without_a_trained_model_there_is_nothing_to_tamper_with(inputs, tmp_path):
    done = tamper(inputs, tmp_path / "run", "tamper={}")
    assert done.code == 2
    assert "no trained model; run `python -m pipelines.run` first" in done.err


def test_pairs_without_safe_queries_are_refused_before_the_training(inputs, tmp_path):
    unsafe = write_jsonl(
        tmp_path / "pairs.jsonl", [row for row in invented_pairs(8) if row["group"] == "unsafe"]
    )
    config = (
        "--config",
        inputs / "config.yaml",
        f"run_dir={tmp_path / 'run'}",
        f"data.path={unsafe}",
        "tamper={}",
    )
    done = run_command("pipelines.score", *config)
    assert done.code == 2
    assert f"tamper: no pair of data.path={unsafe} has group=safe" in done.err
