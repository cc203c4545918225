"""`bdpo init`: a config that can be read and fits what was looked at."""

from __future__ import annotations

import json
import shutil

import pytest

from bdpo.config import load_config
from bdpo.errors import UserError
from bdpo.training.memory import GIB, memory_need, model_shape
from pipelines import init
from tests.support.commands import run_command
from tests.support.helpers import invented_pairs, save_model, write_jsonl

SEVEN_BILLION = "Qwen/Qwen2-7B-Instruct"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_chat):
    """A model and pairs."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model", tiny_chat)
    write_jsonl(folder / "pairs.jsonl", invented_pairs(30))
    return folder


def written(folder, file, *more):
    """What `bdpo init` does for the model and pairs of a folder."""
    return run_command(
        "pipelines.init", file, "--model", folder / "model", "--data", folder / "pairs.jsonl", *more
    )


def test_the_file_is_a_commented_config_for_what_was_found(folder, tmp_path):
    done = written(folder, tmp_path / "my.yaml", "--gpus", 0)
    assert (done.code, done.err) == (0, "")
    assert "trains all weights" in done.out
    assert "30 rows of preference" in done.out
    config = load_config(tmp_path / "my.yaml")
    assert config.data.format == "preference"
    longest = 1.5 * max(len(row["prompt"]) for row in invented_pairs(30))
    assert longest < config.data.max_prompt_length < config.data.max_length <= 512
    for section in (config.score, config.train, config.evaluate):
        assert (section.workers, section.gpus_per_worker) == (1, 0)
    text = (tmp_path / "my.yaml").read_text()
    assert all(f"# {note}" in text for key, note in init.NOTES.items() if key not in ("gpu_memory", "lora"))


def test_an_existing_file_is_not_overwritten(folder, tmp_path):
    (tmp_path / "my.yaml").write_text("mine")
    done = written(folder, tmp_path / "my.yaml", "--gpus", 0)
    assert done.code == 2
    assert done.err == f"error: {tmp_path / 'my.yaml'}: exists already, and is not overwritten\n"
    assert (tmp_path / "my.yaml").read_text() == "mine"


@pytest.mark.parametrize(("gpus", "memory", "adapters"), [(8, 80, False), (1, 80, True), (1, 24, True)])
def test_the_first_plan_that_a_gpu_holds_is_written(
    gpus, memory, adapters, folder, tmp_path, tiny_chat, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(init, "chat_of", lambda model: tiny_chat)
    config, found = init.plan(SEVEN_BILLION, str(folder / "pairs.jsonl"), init.Hardware(gpus, memory))
    assert (config.train.lora is not None) == adapters
    assert config.train.workers == gpus
    shape, _ = model_shape(config)

    def fits(keys):
        lighter = {"lora": None, "gradient_checkpointing": False, **keys}
        tried = config.model_copy(
            update={"train": type(config.train)(**(config.train.model_dump() | lighter))}
        )
        return memory_need(tried, shape).gpu_total <= init.SPARE * memory * GIB

    first = next((keys for keys in init.PLANS if fits(keys)), init.PLANS[-1])
    assert config.train.gradient_checkpointing == first.get("gradient_checkpointing", False)
    assert ("lora" in first) == adapters
    (tmp_path / "my.yaml").write_text(init.commented(config, found))
    assert load_config(tmp_path / "my.yaml").train == config.train


def test_what_cannot_be_read_is_named_in_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    for model, data, message in [
        (tmp_path / "gone", folder / "pairs.jsonl", "gone"),
        (folder / "model", tmp_path / "gone.jsonl", "gone.jsonl"),
        (folder / "model", tmp_path / "bad.jsonl", "none of the first rows can be used (chosen equals"),
    ]:
        done = run_command(
            "pipelines.init", tmp_path / "x.yaml", "--model", model, "--data", data, "--gpus", 0
        )
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert message in done.err
        assert not (tmp_path / "x.yaml").exists()


def test_the_tokenizer_is_read_as_in_every_command(folder, tmp_path):
    """With the same checks: AutoTokenizer alone reads one that gives a text other ids each time."""
    shutil.copytree(folder / "model", tmp_path / "model")
    file = tmp_path / "model/tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["dropout"] = 0.5
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer\.json: model\.dropout=0\.5 would give"):
        init.chat_of(str(tmp_path / "model"))
    (tmp_path / "model/chat_template.jinja").unlink()
    content["model"]["dropout"] = None
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"^--model .*: the tokenizer has no chat template; a chat model is"):
        init.chat_of(str(tmp_path / "model"))
