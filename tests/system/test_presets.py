"""Every preset as it is on disk, on a model of its architecture shrunk in depth and width, on CPU."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bdpo.config import load_config
from bdpo.models.loading import load_model, model_config
from bdpo.models.row_layout import prefix_sharing_obstacle
from bdpo.models.tokenizer import load_tokenizer
from bdpo.scoring.scores import finish_scores, read_scores, score_fingerprint
from bdpo.scoring.shard_scorer import ShardScorer
from bdpo.storage.run_dir import RunDir
from bdpo.training.memory import KNOWN_SHAPES
from pipelines.prepare import Prepare
from tests.support import ROOT
from tests.support.chats import CHATML, MISTRAL, byte_tokenizer
from tests.support.commands import run_command
from tests.support.training import launch, results

CONFIGS = ROOT / "pipelines" / "configs"

TEMPLATES = {"qwen2-7b": CHATML, "qwen2-7b-1gpu": CHATML, "mistral-7b": MISTRAL, "vicuna-7b": None}


WINDOW = 64  # of Mistral's twin, as v0.1 has one: shorter than many of the pairs


# All that a machine without GPU and a model of some thousand parameters need; the rest is the preset's.
SHRUNKEN = [
    "score.gpus_per_worker=0",
    "train.gpus_per_worker=0",
    "train.workers=2",
    "train.max_steps=2",
    "train.global_batch_size=8",
    "data.sample={safe: 8, unsafe: 8}",
]


def pku_rows(count):
    """PKU-SafeRLHF's columns, its safe, unsafe and excluded queries in turn."""
    rng = random.Random(0)
    words = ["amber", "basil", "cedar", "delta", "ember", "fern"]

    def text():
        return " ".join(rng.choices(words, k=rng.randint(3, 20)))

    return [
        {
            "prompt": f"{i} {text()}?", "response_0": text(), "response_1": f"no {text()}",
            "is_response_0_safe": i % 3 == 0, "is_response_1_safe": i % 3 < 2,
            "better_response_id": i % 2, "safer_response_id": 1,
        }
        for i in range(count)
    ]  # fmt: skip


def twin_model(folder, preset, hub_name):
    """The architecture with the proportions of its heads, two layers, and a tokenizer of single bytes."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[preset]
    shape = dict(KNOWN_SHAPES[hub_name])
    group = shape["num_attention_heads"] // shape["num_key_value_heads"]
    heads = max(group, 4)
    shape |= {
        "vocab_size": len(tokenizer), "num_hidden_layers": 2, "hidden_size": 8 * heads,
        "intermediate_size": 24 * heads, "num_attention_heads": heads, "num_key_value_heads": heads // group,
    }  # fmt: skip
    if preset == "mistral-7b":
        shape["sliding_window"] = WINDOW
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Prepared, scored and trained for two steps by two workers: preset -> config."""
    folder = tmp_path_factory.mktemp("presets")
    rows = folder / "pku.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in pku_rows(60)))
    configs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # where the paths in the presets start
        for preset in TEMPLATES:
            file = CONFIGS / f"{preset}.yaml"
            model = twin_model(folder / preset, preset, load_config(file).model.name_or_path)
            paths = [f"run_dir={folder / 'run' / preset}", f"model.name_or_path={model}", f"data.path={rows}"]
            config = configs[preset] = load_config(file, [*paths, *SHRUNKEN])
            run = RunDir(config.run_dir)
            run.open(config)
            Prepare(config, run).complete()
            fingerprint = score_fingerprint(config, run)
            ShardScorer(config, run, fingerprint, "cpu")({"first": 0, "rows": 16})
            finish_scores(run, fingerprint, 0.0)
            pq.write_table(read_scores(config, run), run.root / "scores.parquet")
        launch(list(configs.values()), workers=2)
        yield configs


@pytest.mark.parametrize("preset", TEMPLATES)
def test_the_twin_trains_two_steps_under_zero_3(twins, preset):
    config = twins[preset]
    assert config.train.zero_stage == 3
    rows, trained = results(config)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-2)
    base = load_model(Path(config.model.name_or_path), config.model).state_dict()
    assert trained.keys() == base.keys()
    assert any((trained[name] != base[name].float()).any() for name in base)
    assert config.data.sample == {"safe": 8, "unsafe": 8}


def test_only_the_sliding_window_keeps_rows_apart(twins):
    why = {name: prefix_sharing_obstacle(model_config(twins[name].model), 1024) for name in twins}
    assert "sliding window of 64 tokens" in why.pop("mistral-7b")
    assert set(why.values()) == {None}


def test_vicunas_template_is_fastchats(twins):
    """The format of lm-sys/FastChat, `vicuna_v1.1`, as its documentation has it."""
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    chat = load_tokenizer(twins["vicuna-7b"].model)
    messages = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi!"}]
    prompt = chat.prompt_ids([*messages, {"role": "user", "content": "How are you?"}])
    decode = chat.tokenizer.decode
    assert decode(prompt) == f"<s>{system} USER: Hello! ASSISTANT: Hi!</s>USER: How are you? ASSISTANT:"
    assert decode(chat.response_ids("Fine.")) == " Fine.</s>"


def test_the_command_with_dry_run_leaves_no_run_folder(twins, tmp_path):
    config = twins["qwen2-7b"]
    file, run_dir = tmp_path / "config.yaml", tmp_path / "run"
    file.write_text(config.to_yaml())
    done = run_command("pipelines.train", "--config", file, "--dry-run", f"run_dir={run_dir}")
    assert done.code == 0, done.err
    assert "memory of each worker" in done.out
    assert not run_dir.exists()
