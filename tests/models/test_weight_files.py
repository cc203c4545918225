"""Which files of a model folder are its weights, and what else may lie beside them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from bdpo.errors import UserError
from bdpo.models.weight_files import require_finite_files, require_weight_files, weight_files

WEIGHTS = {"model.norm.weight": torch.ones(2), "lm_head.weight": torch.ones(2, 2)}

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def single(folder):
    save_file(WEIGHTS, folder / "model.safetensors")


def sharded(folder):
    for file, tensor in ((FIRST, "model.norm.weight"), (SECOND, "lm_head.weight")):
        save_file({tensor: WEIGHTS[tensor]}, folder / file)
    index(folder, {"model.norm.weight": FIRST, "lm_head.weight": SECOND})


def index(folder, weight_map):
    content = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def configured(folder):
    """config.json may name the file: `transformers_weights`."""
    save_file(WEIGHTS, folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps({"transformers_weights": "weights.safetensors"}))


READ = {single: ["model.safetensors"], sharded: [FIRST, SECOND], configured: ["weights.safetensors"]}

every_layout = pytest.mark.parametrize("layout", READ, ids=lambda layout: layout.__name__)


def refusal(folder):
    with pytest.raises(UserError) as caught:
        require_weight_files(folder, "the model")
    message = str(caught.value)
    assert "\n" not in message
    return message


@every_layout
def test_the_files_that_transformers_reads(tmp_path, layout):
    layout(tmp_path)
    require_weight_files(tmp_path, "the model")
    assert [file.name for file in weight_files(tmp_path)] == READ[layout]


# Beside the weights of real publications: another format with the same names, an adapter's weights, a head.
BESIDE = {
    "consolidated.safetensors": WEIGHTS,
    "consolidated-00001-of-00002.safetensors": WEIGHTS,
    "model.fp32.safetensors": WEIGHTS,
    "model.fp32-00001-of-00002.safetensors": WEIGHTS,
    "model-00001-of-00002.fp16.safetensors": WEIGHTS,
    "optimizer.safetensors": WEIGHTS,
    "adapter_model.safetensors": {"base_model.model.lm_head.lora_A.weight": torch.ones(1)},
    "value_head.safetensors": {"v_head.summary.weight": torch.ones(1)},
}


@every_layout
@pytest.mark.parametrize("name", BESIDE)
def test_a_file_that_holds_something_else_may_lie_beside_the_weights(tmp_path, layout, name):
    layout(tmp_path)
    save_file(BESIDE[name], tmp_path / name)
    require_weight_files(tmp_path, "the model")


def test_what_is_not_read_may_be_quantised_or_missing(tmp_path):
    single(tmp_path)
    save_file({"lm_head.weight": torch.ones(2, dtype=torch.int8)}, tmp_path / "model.int8.safetensors")
    index(tmp_path, {"lm_head.weight": "model-00001-of-00001.safetensors"})  # left by an earlier export
    require_weight_files(tmp_path, "the model")


@every_layout
@pytest.mark.parametrize(
    "name", ["best.safetensors", "model-00001-of-00003.safetensors", "model_old.safetensors"]
)
def test_a_second_file_of_the_same_tensors_is_refused_by_name(tmp_path, layout, name):
    layout(tmp_path)
    save_file({"model.norm.weight": torch.zeros(2)}, tmp_path / name)
    message = refusal(tmp_path)
    assert message.startswith(
        f"the model: {name} holds other weights of the model (model.norm.weight) beside "
    )
    assert READ[layout][0] in message


def test_shards_beside_a_single_file_are_refused(tmp_path):
    """transformers reads the single file, whatever the index says."""
    sharded(tmp_path)
    single(tmp_path)
    assert (
        f"{FIRST} holds other weights of the model (model.norm.weight) beside model.safetensors"
        in refusal(tmp_path)
    )


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    """Whatever the index says of it, transformers takes the one that it reads last."""
    sharded(tmp_path)
    save_file(WEIGHTS, tmp_path / SECOND)
    assert f"{SECOND} holds other weights of the model (model.norm.weight) beside {FIRST}" in refusal(
        tmp_path
    )


def test_an_index_that_names_another_shard_for_a_tensor_is_refused(tmp_path):
    sharded(tmp_path)
    index(tmp_path, {"model.norm.weight": SECOND, "lm_head.weight": SECOND, "of.a.buffer": FIRST})
    message = refusal(tmp_path)
    assert message.endswith(f"index.json: names {SECOND} for model.norm.weight, which is in {FIRST}")


def test_an_adapter_beside_its_model_is_refused(tmp_path):
    """transformers applies it wherever peft is installed: the same folder would be two models."""
    single(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "the folder holds a model and an adapter" in refusal(tmp_path)


def test_weights_of_another_name_are_not_the_weights(tmp_path):
    save_file(WEIGHTS, tmp_path / "weights.safetensors")
    assert refusal(tmp_path).endswith(
        "has neither model.safetensors nor model.safetensors.index.json, which names other files"
    )


def test_a_missing_shard_is_named(tmp_path):
    sharded(tmp_path)
    (tmp_path / SECOND).unlink()
    assert refusal(tmp_path) == f"the model: files of weights are missing ({SECOND})"


NO_INDEX = {
    "[]": "holds no JSON object",
    "{": "cannot be read as JSON",
    '{"weight_map": [1]}': "is no index of weights",
    '{"weight_map": null}': "is no index of weights",
    '{"weight_map": {}}': "is no index of weights",
    '{"weight_map": {"a": 1}}': "is no index of weights",
    '{"weight_map": {"a": "x", "a": "y"}}': "the key a stands twice",
    json.dumps({"weight_map": {"a": FIRST}}): "has no metadata, which transformers reads",
    '{"metadata": {}, "weight_map": {"a": "../x.safetensors"}}': "names files that are not in its folder",
}


@pytest.mark.parametrize("content", NO_INDEX)
def test_an_index_that_is_none_is_refused(tmp_path, content):
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert f"model.safetensors.index.json: {NO_INDEX[content]}" in refusal(tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_found_in_their_file(tmp_path, value, dtype):
    damaged = torch.ones(3, 3, dtype=dtype)
    damaged[1, 2] = value
    save_file({"sound": torch.ones(2, dtype=dtype), "empty": torch.ones(0)}, tmp_path / "a.safetensors")
    save_file({"damaged": damaged, "steps": torch.ones(1, dtype=torch.int64)}, tmp_path / "b.safetensors")
    files = sorted(tmp_path.glob("*.safetensors"))
    require_finite_files(files[:1], tmp_path)
    with pytest.raises(UserError, match=r"NaN or infinite weights in 1 tensors \(damaged\)"):
        require_finite_files(files, tmp_path)
