"""FlexAttention is taken where it was seen to work, and nowhere else. Without a GPU it never is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, MistralConfig

from bdpo.models import attention
from bdpo.models.architectures import one_layer
from bdpo.models.attention import attention_of, why_not_flex
from bdpo.models.loading import load_model
from bdpo.models.logps import LogpsModel
from bdpo.models.packing import SharedMask
from tests.support.helpers import VOCABULARY, tiny_config, tiny_qwen2

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

CPU = torch.device("cpu")

SHAPE = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, layer_types=["full_attention"] * 3,
)  # fmt: skip

WINDOWED = MistralConfig(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, sliding_window=2048,
)  # fmt: skip


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def uncompiled():
    """What is tried is the same; only nothing has to be compiled."""
    with torch.compiler.set_stance("force_eager"):
        yield


def test_a_device_without_backward_is_found_out(dtype):
    """The log-probs agree, so what is said is of the gradient."""
    assert "backward" in why_not_flex(SHAPE, dtype, CPU, 512)


@pytest.mark.parametrize("shape", [SHAPE, WINDOWED], ids=["llama", "mistral"])
def test_a_mask_that_shows_responses_each_other_is_found_out(shape, dtype, monkeypatch):
    right = SharedMask.blocks
    monkeypatch.setattr(
        SharedMask,
        "blocks",
        lambda mask: right(replace(mask, response_of=torch.zeros_like(mask.response_of))),
    )
    assert why_not_flex(shape, dtype, CPU, 512) == "computes other log-probs than SDPA"


def test_it_is_not_tried_where_rows_are_not_shared(dtype):
    assert "not shared" in why_not_flex(WINDOWED, dtype, CPU, 4096)


def test_another_gradient_is_found_out(dtype):
    exact, sdpa, other = (
        LogpsModel(one_layer(SHAPE, "sdpa", of, CPU), 512) for of in (torch.float32, dtype, dtype)
    )
    batch = sdpa.layout.pack(attention._groups(attention.FIRST_SHAPES[0]))
    assert attention._differs(exact, sdpa, other, batch) is None
    other.model.base_model.layers[0].self_attn.q_proj.weight.register_hook(lambda gradient: 2 * gradient)
    assert attention._differs(exact, sdpa, other, batch) == "computes another gradient than SDPA"


@pytest.mark.parametrize("wanted", ["auto", "flex_attention", "eager"])
def test_without_a_gpu_it_is_sdpa_or_what_is_named(wanted, tmp_path):
    tiny_qwen2().save_pretrained(tmp_path)
    config = tiny_config(tmp_path / "run", tmp_path, tmp_path / "pairs.jsonl")
    model = config.model.model_copy(update={"attn_implementation": wanted})
    config = config.model_copy(update={"model": model})
    expected = "eager" if wanted == "eager" else "sdpa"
    assert attention_of(config, CPU) == expected
    assert load_model(tmp_path, config.model).config._attn_implementation == expected


def test_the_trial_leaves_room_for_the_compilations_of_a_run():
    """Dynamo's own limit of 8 is spent on the trial: what follows would run uncompiled, with full scores."""
    import torch._dynamo

    def compilations(count):
        """How often a function is compiled that is called in so many ways."""
        compiled = []
        torch._dynamo.reset()
        called = torch.compile(
            lambda x, way: x + len(way), backend=lambda graph, _: compiled.append(1) or graph
        )
        with torch.compiler.set_stance("default"):
            for length in range(count):
                called(torch.ones(1), "x" * length)
        return len(compiled)

    # Dynamo's own patch: pytest's would delete the setting, which Dynamo takes as "does not exist".
    with torch._dynamo.config.patch(recompile_limit=8):
        assert compilations(12) == 8
        why_not_flex(SHAPE, torch.float32, CPU, 512)
        assert compilations(12) == 12
    with torch._dynamo.config.patch(recompile_limit=1000):
        why_not_flex(SHAPE, torch.float32, CPU, 512)
        assert torch._dynamo.config.recompile_limit == 1000
