"""The memory that is foretold, against DeepSpeed's estimators and against what autograd really keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bdpo.config import parse_config
from bdpo.errors import UserError
from bdpo.models.logps import LogpsModel
from bdpo.models.row_layout import RowLayout
from bdpo.models.transformers_private import set_attention
from bdpo.training import memory
from bdpo.training.step_time import step_time
from pipelines.runtime.plan_table import print_plan, require_memory
from tests.support.helpers import VOCABULARY


def config_of(model="Qwen/Qwen2-7B-Instruct", dtype="bfloat16", data=None, method="bdpo", **train):
    data = {"path": "p", **(data or {})}
    return parse_config(
        {
            "run_dir": "r",
            "model": {"name_or_path": model, "dtype": dtype},
            "data": data,
            "train": train,
            "method": {"name": method},
        },
        "test",
    )


def shape_of(name):
    values = dict(memory.KNOWN_SHAPES[name])
    return AutoConfig.for_model(values.pop("model_type"), **values)


@pytest.mark.parametrize(
    ("name", "bias", "billions"),
    [
        ("Qwen/Qwen2-7B-Instruct", True, "7.62"),
        ("mistralai/Mistral-7B-Instruct-v0.3", False, "7.25"),
        ("lmsys/vicuna-7b-v1.5", False, "6.74"),
    ],
)
def test_the_known_shapes_have_the_published_sizes(name, bias, billions):
    s = memory.KNOWN_SHAPES[name]
    h, i, layers = s["hidden_size"], s["intermediate_size"], s["num_hidden_layers"]
    kv = h // s["num_attention_heads"] * s["num_key_value_heads"]
    layer = 2 * h * h + 2 * h * kv + 3 * h * i + 2 * h + bias * (h + 2 * kv)
    expected = 2 * s["vocab_size"] * h + layers * layer + h
    found = memory.memory_need(config_of(name, workers=8), shape_of(name)).parameters
    assert found == expected
    assert f"{found / 1e9:.2f}" == billions


def test_a_checkpoint_holds_what_is_trained():
    """12 bytes a parameter for its float32 copy and two moments, some 90 GB; below stage 3 itself as well."""
    name = "Qwen/Qwen2-7B-Instruct"
    assert memory.checkpoint_bytes(config_of(name, workers=8), shape_of(name)) == 12 * 7_615_616_512
    stage2 = config_of(name, workers=8, zero_stage=2)
    assert memory.checkpoint_bytes(stage2, shape_of(name)) == 14 * 7_615_616_512
    stage0 = config_of(name, dtype="float32", zero_stage=0)  # the parameters are their own masters
    assert memory.checkpoint_bytes(stage0, shape_of(name)) == 12 * 7_615_616_512
    adapter = config_of(name, lora={"r": 8})
    assert memory.checkpoint_bytes(adapter, shape_of(name)) < 12 * 7_615_616_512 / 100


class TestAgainstDeepSpeed:
    """Its figures without the largest layer and without the safety factor on the host."""

    N, WORKERS = 7_615_616_512, 8

    def ours(self, **train):
        gpu, host = memory.model_state_bytes(config_of(workers=self.WORKERS, **train), self.N, self.N)
        buffers = ("gathered parameters", "buffer to reduce gradients")
        return sum(host.values()) * self.WORKERS, sum(v for k, v in gpu.items() if k not in buffers)

    @pytest.mark.parametrize(("optimizer", "parameters"), [(False, False), (True, False), (True, True)])
    def test_stage_3(self, optimizer, parameters):
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as estimate

        theirs = estimate(
            self.N, 0, self.WORKERS, cpu_offload=optimizer, cpu_offload_params=parameters,
            additional_buffer_factor=1,
        )  # fmt: skip
        ours = self.ours(offload="cpu" if optimizer else None, offload_parameters=parameters)
        assert ours == pytest.approx(theirs[:2], abs=64)

    def test_stage_2(self):
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as estimate

        assert self.ours(zero_stage=2)[1] == pytest.approx(
            estimate(self.N, self.WORKERS, cpu_offload=False)[1], abs=64
        )

    def test_buffers_are_deepspeeds(self):
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        defaults = DeepSpeedZeroConfig(stage=3)
        assert (
            defaults.reduce_bucket_size,
            defaults.max_live_parameters,
        ) == (memory.REDUCE_BUCKET, memory.MAX_LIVE_PARAMETERS)


def test_without_partition_each_worker_holds_it_all():
    gpu, host = memory.model_state_bytes(config_of(dtype="float32", workers=8, zero_stage=0), 1000, 1000)
    assert (sum(gpu.values()), host) == (16 * 1000, {})  # parameters, gradients, two moments


SHAPES = {
    "qwen2": {},
    "mistral": {"sliding_window": 40},  # plain rows
    "llama": {"num_key_value_heads": 4},
    "gemma": {"head_dim": 8},
    "stablelm": {},  # plain rows
}


@pytest.mark.parametrize("model_type", SHAPES)
def test_activations_are_what_autograd_keeps_of_a_real_forward(model_type):
    common = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    shape = AutoConfig.for_model(model_type, **common | SHAPES[model_type])
    lengths = {"max_length": 100, "max_prompt_length": 60}
    options = {"dtype": "float32", "data": lengths, "tokens_per_micro_batch": 700}
    config = config_of(gradient_checkpointing=False, **options)

    def kept(layers):
        real = copy.deepcopy(shape)
        real.num_hidden_layers = layers
        if getattr(real, "layer_types", None):
            real.layer_types = real.layer_types[:layers]
        policy = LogpsModel(AutoModelForCausalLM.from_config(real, attn_implementation="sdpa").float(), 100)
        own = {p.data_ptr() for p in policy.parameters()}
        found = {}

        def keep(tensor):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            groups = memory._longest_pairs(config, shape)
            groups.lengths[-1, -1] -= 1  # a row that is padded, as nearly every batch has one
            policy(policy.layout.pack(groups))
        return sum(storage.nbytes() for pointer, storage in found.items() if pointer not in own)

    all_layers = kept(5)
    assert memory.activation_bytes(config, shape) == pytest.approx(all_layers, rel=0.05)
    layer = (all_layers - kept(1)) / 4
    tokens = (
        600 if model_type in ("mistral", "stablelm") else 700
    )  # 4 pairs as long as fit; plain rows are padded
    recomputed = all_layers - 5 * layer + layer + 5 * tokens * 32 * 4
    found = memory.activation_bytes(config_of(gradient_checkpointing=True, **options), shape)
    assert found == pytest.approx(recomputed, rel=0.05)


def test_of_a_model_with_lora_only_the_adapters_have_gradients_and_optimizer():
    """Two matrices of rank 8 beside each of the seven linear layers of a block."""
    name = "lmsys/vicuna-7b-v1.5"
    config = config_of(name, zero_stage=0, dtype="float32", lora={"r": 8})
    need = memory.memory_need(config, shape_of(name))
    s = memory.KNOWN_SHAPES[name]
    h, i = s["hidden_size"], s["intermediate_size"]
    adapters = s["num_hidden_layers"] * 8 * (4 * (h + h) + 3 * (h + i))
    assert need.gpu["gradients, float32"] == 4 * adapters
    assert need.gpu["optimizer, float32"] == 8 * adapters
    assert need.parameters - adapters == memory.memory_need(config_of(name), shape_of(name)).parameters


@pytest.mark.parametrize("name", memory.KNOWN_SHAPES)
def test_a_micro_batch_of_a_known_shape_is_full(monkeypatch, name):
    """In rows as the training makes them: a model that shares them has room for more pairs."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = config_of(name, data={"max_length": 1024, "max_prompt_length": 512}, tokens_per_micro_batch=8192)
    shape, _ = memory.model_shape(config)
    tokens = memory._longest_pairs(config, shape).lengths.sum()
    assert 0.95 * 8192 < tokens <= 8192


@pytest.fixture
def parts():
    """A small model of text and pictures, whose config.json has the sizes of the text one level down."""
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
        "layer_types": ["full_attention"] * 3,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    found = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    assert not hasattr(found, "hidden_size")
    return found


def test_of_a_model_of_several_parts_the_text_part_has_the_layers_and_the_head(parts):
    config = config_of("parts", data={"max_length": 100, "max_prompt_length": 60}, tokens_per_micro_batch=400)
    need = memory.memory_need(config, parts)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(parts)
    assert need.parameters == sum(p.numel() for p in whole.parameters())
    assert need.gpu["output head, a chunk at a time"] == (memory.CHUNK_ELEMENTS + VOCABULARY * 32) * (4 + 2)
    assert step_time(config, parts).seconds > 0


def test_the_plan_lays_out_as_many_responses_as_the_method_forwards(parts):
    shape = shape_of("Qwen/Qwen2-7B-Instruct")
    set_attention(shape, "sdpa")
    for method, responses in (("dpo", 2), ("sft", 1)):
        config = config_of(method=method, workers=1)
        assert memory.training_layout(config, shape) == RowLayout(3584, True, responses)
        assert memory.training_layout(config, parts) == RowLayout(32, False, responses)
        assert step_time(config, shape).tokens == (50 + 125 * responses) * config.train.global_batch_size


def test_a_gpu_that_is_too_small_is_refused_before_it_is_taken():
    small = config_of("Qwen/Qwen2-7B-Instruct", gpu_memory=79, workers=1)
    shape = shape_of("Qwen/Qwen2-7B-Instruct")
    need = memory.memory_need(small, shape)
    with pytest.raises(
        UserError, match=r"each GPU would need 1\d\d\.\d GiB and has 79\.0.*train\.offload=cpu"
    ):
        memory.require_gpu_memory(small, need, memory.gpu_memory(small.train))
    offloaded = config_of("Qwen/Qwen2-7B-Instruct", gpu_memory=79, workers=1, offload="cpu")
    memory.require_gpu_memory(offloaded, memory.memory_need(offloaded, shape), 79 * memory.GIB)


def test_nothing_is_computed_where_there_is_no_gpu_to_compare_with():
    require_memory(config_of("/no/such/model", gpus_per_worker=0))


def test_a_model_without_any_config_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model.name_or_path=nobody/nothing: config.json is unavailable"):
        print_plan(config_of("nobody/nothing"))
