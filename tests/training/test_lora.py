"""LoRA training for real: DeepSpeed in gloo processes; adapter and merged model as others load them."""

from __future__ import annotations

import copy
import json
import shutil

import peft
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from bdpo.config import LoraConfig, ModelConfig, load_config, parse_config
from bdpo.errors import UserError
from bdpo.models.adapters import adapter_folder, add_lora, base_of, check_lora, load_adapted
from bdpo.models.loading import load_model, model_folder
from bdpo.models.logps import LogpsModel
from bdpo.storage.checksums import CHECKSUMS
from bdpo.storage.run_dir import RunDir
from bdpo.training.loop import evaluate
from bdpo.training.pairs import TrainingPairs
from tests.support.helpers import tiny_config, tiny_gpt2, tiny_qwen2
from tests.support.training import (
    copied,
    launch,
    metrics,
    score,
    trained,
    weights,
)

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny_chat):
    return score(tmp_path_factory.mktemp("scored"), tiny_chat)


@pytest.fixture(scope="module")
def whole(scored, tmp_path_factory):
    """Two ZeRO-3 workers, dropout in the adapters, activations recomputed."""
    lora = {"r": 4, "dropout": 0.2, "target_modules": ["q_proj", "down_proj"]}
    return trained(
        scored,
        tmp_path_factory.mktemp("whole") / "run",
        workers=2,
        train={"lora": lora, "gradient_checkpointing": True},
    )


def test_the_adapter_over_the_base_says_what_the_merged_model_says(scored, whole):
    """Of PEFT over the base, of the base with it merged as evaluate.adapter loads it, and of `model`."""
    adapter = adapter_folder(str(whole.adapter), "evaluate.adapter")
    base = load_model(model_folder(scored.model), scored.model)
    ids = torch.arange(6, 40)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        merged = load_model(whole.model, scored.model)(input_ids=ids).logits
        evaluated = load_adapted(scored.model, adapter)(input_ids=ids).logits
        expected = peft.PeftModel.from_pretrained(base, whole.adapter).eval()(input_ids=ids).logits
    assert torch.equal(evaluated, merged)
    scale = expected.abs().max()
    torch.testing.assert_close(merged / scale, expected / scale, rtol=0, atol=1e-5)
    assert (merged - before).abs().max() > 0.01 * scale
    assert base_of(adapter).name_or_path == scored.model.name_or_path
    assert (whole.adapter / CHECKSUMS).is_file()
    assert (whole.model / CHECKSUMS).is_file()


def test_only_what_is_adapted_is_trained(scored, whole):
    base = load_model(model_folder(scored.model), scored.model).state_dict()
    merged = weights(whole)
    assert base.keys() == merged.keys()
    for name, weight in base.items():
        adapted = name.endswith(("q_proj.weight", "down_proj.weight"))
        assert torch.equal(merged[name], weight) != adapted, name
    rows = [json.loads(line) for line in whole.metrics.read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-5)
    frozen = sum(weight.numel() * 4 for weight in base.values())
    saved = whole.root / "checkpoints" / "2" / "state"
    assert sum(file.stat().st_size for file in saved.iterdir()) < frozen, "it holds what is frozen as well"


def test_a_resumed_training_ends_exactly_as_the_uninterrupted_one(scored, whole, tmp_path):
    train = load_config(whole.config).train.model_dump()
    config = copied(scored, tmp_path / "resumed", [whole.root / "checkpoints" / "2"], train=train)
    run = RunDir(config.run_dir)
    shutil.copy(whole.metrics, run.metrics)
    launch([config], 2)
    assert_same_adapter(run, whole, rtol=0, atol=0)
    for name in ("step", "loss", "grad_norm", "learning_rate"):
        assert metrics(run, name) == metrics(whole, name)


DRAWS_BEFORE_EACH_STEP = """
train_step = training.train_step
def after_draws(*arguments):
    torch.rand(5)
    return train_step(*arguments)
training.train_step = after_draws
"""


def test_the_dropout_of_a_step_does_not_depend_on_what_was_drawn_before_it(scored, whole, tmp_path):
    config = copied(scored, tmp_path / "draws", train=load_config(whole.config).train.model_dump())
    run = RunDir(config.run_dir)
    (run.root / "fault.py").write_text(DRAWS_BEFORE_EACH_STEP)
    launch([config], 2)
    assert metrics(run, "loss") == metrics(whole, "loss")
    assert_same_adapter(run, whole, rtol=0, atol=0)


@pytest.mark.usefixtures("alone")
def test_held_out_pairs_are_evaluated_without_dropout(scored):
    """Twice the same, and as before the adapter, which changes nothing yet."""
    lora = {"r": 4, "dropout": 0.5, "target_modules": ["q_proj"]}
    config = parse_config(scored.model_dump() | {"train": scored.train.model_dump() | {"lora": lora}}, "test")
    run = RunDir(config.run_dir)
    data = TrainingPairs.load(config, run, pq.read_table(run.root / "scores.parquet"))
    model = load_model(model_folder(config.model), config.model)
    add_lora(model, config.train.lora, config.model, 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    policy = LogpsModel(model, config.data.max_length).train()
    assert evaluate(policy, data) == evaluate(policy, data)
    assert policy.training
    assert (
        data.packed([0]).logps(policy).policy_chosen != data.packed([0]).logps(policy).policy_chosen
    )  # there is dropout


def test_two_zero_3_workers_train_as_one_of_stage_1(scored, tmp_path):
    lora = {"r": 4, "alpha": 8}
    two = trained(scored, tmp_path / "two", workers=2, train={"lora": lora})
    one = trained(scored, tmp_path / "one", train={"lora": lora, "zero_stage": 1})
    for name in ("loss", "rewards/margins", "grad_norm"):
        assert metrics(two, name) == pytest.approx(metrics(one, name), rel=1e-4, abs=1e-6), name
    assert_same_adapter(two, one, rtol=1e-4, atol=1e-5)


def assert_same_adapter(run, other, **tolerance):
    ours, theirs = (load_file(r.adapter / "adapter_model.safetensors") for r in (run, other))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=name, **tolerance)


def test_fresh_adapters_change_nothing_and_depend_on_the_seed():
    base, ids = ModelConfig(name_or_path="."), torch.arange(6, 30)[None]
    plain = tiny_qwen2()
    adapted = [copy.deepcopy(plain) for _ in range(3)]
    for model, seed in zip(adapted, (0, 0, 1), strict=True):
        add_lora(model, LoraConfig(dropout=0.5), base, seed)
        assert torch.equal(model.train()(input_ids=ids).logits, plain(input_ids=ids).logits)
    one, same, other = (model.get_adapter_state_dict() for model in adapted)
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_an_adapter_of_a_model_on_the_hub_names_it_there():
    model = tiny_gpt2()
    add_lora(model, LoraConfig(), ModelConfig(name_or_path="an/other", revision="7"), seed=0)
    config = model.peft_config["default"]
    assert (config.base_model_name_or_path, config.revision) == ("an/other", "7")


@pytest.mark.parametrize(
    ("target", "why"),
    [(["c_attn"], "'c_attn'} not found"), (["q_proj", "lm_head"], "the output head cannot be adapted")],
)
def test_layers_that_cannot_be_adapted_are_named_before_anything_is_loaded(scored, tmp_path, target, why):
    config = tiny_config(
        tmp_path, scored.model.name_or_path, tmp_path, train={"lora": {"target_modules": target}}
    )
    with pytest.raises(UserError, match=rf"train\.lora\.target_modules=.*{why}"):
        check_lora(config)
