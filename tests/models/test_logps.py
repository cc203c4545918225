"""The shared forward against the obvious one: one sequence at a time, in float64."""

from __future__ import annotations

import copy
import logging
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    Qwen2Config,
)

import bdpo.models.logps
from bdpo.models.loading import warn_once
from bdpo.models.logps import LogpsHead, LogpsModel
from bdpo.models.packing import PrefixGroups
from bdpo.models.row_layout import RowLayout, prefix_sharing_obstacle
from bdpo.models.tokenizer import EncodedPair
from tests.support.helpers import (
    VOCABULARY,
    encoded_pairs,
    logps_of,
    naive_logps,
    tiny_gpt2,
    tiny_qwen2,
)

MODELS = {"rope": tiny_qwen2, "tied": lambda: tiny_qwen2(tied=True), "gpt2": tiny_gpt2}

# prompt, chosen and rejected tokens: single tokens, equal lengths, one long pair among short ones
SHAPES = [(1, 1, 1), (1, 7, 2), (9, 1, 3), (5, 5, 5), (5, 5, 5), (40, 23, 11), (2, 60, 1), (100, 28, 28)]


def shared(model):
    return LogpsModel(copy.deepcopy(model), max_length=128)


def plain(model):
    model = shared(model)
    model.layout = RowLayout(model.layout.hidden_size, shared=False)
    return model


def forward(model, groups):
    return model(model.layout.pack(groups))


def naive_pairs(model, pairs):
    sides = [[(p.prompt, p.chosen) for p in pairs], [(p.prompt, p.rejected) for p in pairs]]
    return [naive_logps(model, rows) for rows in sides]


@pytest.fixture
def small_chunks(monkeypatch):
    """Three response tokens at a time."""
    monkeypatch.setattr(bdpo.models.logps, "CHUNK_ELEMENTS", 3 * VOCABULARY + 5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [shared, plain])
def test_agrees_with_one_sequence_at_a_time_in_float64(name, rows, small_chunks):
    model, pairs = MODELS[name](), encoded_pairs(SHAPES)
    with torch.no_grad():
        ours = logps_of(rows(model), pairs)
    for side, naive in zip(ours, naive_pairs(model, pairs), strict=True):
        assert side.dtype == torch.float32
        torch.testing.assert_close(side.double(), naive, rtol=1e-5, atol=0)


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"

TEMPLATES = {
    "chatml": CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "system turn": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    + CHATML
    + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "bos": "<s>{% for m in messages %}<|header|>{{ m.role }}:{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant:{% endif %}",
}

CONVERSATIONS = [
    [{"role": "user", "content": "Why is the sky blue?"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And?"},
    ],
]


@torch.no_grad()
@pytest.mark.parametrize("template", TEMPLATES)
def test_conditional_and_unconditional_terms_of_several_chat_templates(template, make_chat):
    model, chat = tiny_qwen2(), make_chat(TEMPLATES[template])
    pairs = [
        EncodedPair(chat.prompt_ids(prompt), chat.response_ids("It scatters."), chat.response_ids("No"))
        for prompt in CONVERSATIONS
    ]
    for ours, naive in zip(logps_of(shared(model), pairs), naive_pairs(model, pairs), strict=True):
        torch.testing.assert_close(ours.double(), naive, rtol=1e-5, atol=0)
    empty = chat.unconditional_ids("empty_turn")
    responses = [response for pair in pairs for response in (pair.chosen, pair.rejected)]
    ours = forward(shared(model), PrefixGroups.of([empty, response] for response in responses))
    naive = naive_logps(model, [(empty, response) for response in responses])
    torch.testing.assert_close(ours.double(), naive, rtol=1e-5, atol=0)


def flex(model):
    model = copy.deepcopy(model)
    model.set_attn_implementation("flex_attention")
    return LogpsModel(model, max_length=128)


def one_prompt(pairs):
    """Unconditional terms: all responses behind the same c(∅), which is there once a row."""
    return PrefixGroups.of(pairs).behind([7, 8])


@torch.no_grad()
@pytest.mark.parametrize("groups_of", [PrefixGroups.of, one_prompt])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_agrees_with_sdpa_and_with_plain_rows(tied, groups_of):
    """Uncompiled: it says what the mask makes of the rows, not what a GPU's kernel does. Forward only,
    for FlexAttention has no backward on a CPU."""
    model, groups = tiny_qwen2(tied=tied), groups_of(encoded_pairs(SHAPES))
    masks = []
    ours = flex(model)
    ours.model.base_model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, inputs: masks.append(inputs["attention_mask"]), with_kwargs=True
    )
    with torch.compiler.set_stance("force_eager"):
        logps = forward(ours, groups)
    assert [type(mask) for mask in masks] == [BlockMask]
    for rows in (shared, plain):
        torch.testing.assert_close(logps, forward(rows(model), groups), rtol=1e-5, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=15)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 20), *[st.integers(1, 30)] * 2), min_size=1, max_size=9),
    seed=st.integers(0, 9),
)
def test_a_pair_scores_the_same_in_any_company(name, shapes, seed):
    model, pairs = shared(MODELS[name]()), encoded_pairs(shapes, seed)
    together = torch.stack(logps_of(model, pairs), 1)
    backwards = torch.stack(logps_of(model, pairs[::-1]), 1).flip(0)
    alone = torch.cat([torch.stack(logps_of(model, [pair]), 1) for pair in pairs])
    torch.testing.assert_close(backwards, together, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_shared_rows_are_those_of_the_models_own_logits(name, small_chunks):
    model, pairs = MODELS[name](), encoded_pairs(SHAPES)
    ours, reference = shared(model), copy.deepcopy(model).double()
    margins = torch.linspace(-1, 1, len(pairs))  # a gradient of its own for every response
    chosen, rejected = logps_of(ours, pairs)
    (margins * chosen - margins.flip(0) * rejected).sum().backward()
    for margin, other, pair in zip(margins, margins.flip(0), pairs, strict=True):
        for scale, response in ((margin, pair.chosen), (-other, pair.rejected)):
            logits = reference(torch.tensor([pair.prompt + response])).logits[0, len(pair.prompt) - 1 : -1]
            picked = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])
            (scale * picked.sum()).backward()
    gradients = {name: parameter.grad for name, parameter in ours.model.named_parameters()}
    assert gradients.keys() == {name for name, _ in reference.named_parameters()}
    for key, parameter in reference.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(gradients[key].double(), parameter.grad, rtol=1e-5, atol=1e-5 * scale)


def test_the_heads_gradients_are_those_of_autograd(monkeypatch):
    """With a bias, and for parts of the inputs frozen as under LoRA."""
    monkeypatch.setattr(bdpo.models.logps, "CHUNK_ELEMENTS", 2 * 7)
    torch.manual_seed(0)
    head, hidden = LogpsHead(torch.nn.Linear(4, 7)), torch.randn(5, 4, requires_grad=True)
    targets = torch.tensor([0, 6, 3, 3, 1])
    exact = torch.autograd.grad(
        torch.nn.functional.linear(hidden, head.weight, head.bias)
        .log_softmax(-1)[range(5), targets]
        .square()
        .sum(),
        [hidden, head.weight, head.bias],
    )
    ours = torch.autograd.grad(head(hidden, targets).square().sum(), [hidden, head.weight, head.bias])
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b)
    head.requires_grad_(False)
    head(hidden, targets).square().sum().backward()
    torch.testing.assert_close(hidden.grad, exact[0])


def test_the_heads_weight_gradient_is_summed_in_float32(monkeypatch):
    """Of a bfloat16 head, over many chunks: summed in bfloat16 it would stop growing."""
    monkeypatch.setattr(bdpo.models.logps, "CHUNK_ELEMENTS", 2 * 7)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 4, generator=generator).bfloat16()
    hidden = (1 + torch.rand(1000, 4, generator=generator)).bfloat16()
    targets = torch.randint(0, 2, (1000,), generator=generator)
    head = LogpsHead(torch.nn.Linear(4, 7, bias=False, dtype=torch.bfloat16))
    head.weight = torch.nn.Parameter(weight.clone())
    head(hidden, targets).sum().backward()
    exact = weight.double().requires_grad_()
    (hidden.double() @ exact.T).log_softmax(-1)[range(1000), targets].sum().backward()
    error = (head.weight.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    assert error < 0.004  # the gradient itself is rounded to bfloat16


class Widest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made, views apart."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_iter(made) if isinstance(t, torch.Tensor) and not t._is_view()]
        self.elements = max([self.elements, *sizes])
        return made


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    "of", [partial(Qwen2Config, **SMALL), partial(MixtralConfig, **SMALL, num_local_experts=2)]
)
def test_no_tensor_is_larger_than_a_chunk_of_logits(of, monkeypatch):
    vocabulary, chunk = 5000, 50  # tokens a chunk: more elements than any parameter has
    monkeypatch.setattr(bdpo.models.logps, "CHUNK_ELEMENTS", chunk * vocabulary + 1)
    model = LogpsModel(AutoModelForCausalLM.from_config(of(vocab_size=vocabulary)), max_length=512)
    pairs = encoded_pairs([(20, 100, 90), (10, 80, 120)])
    with Widest() as widest:
        chosen, rejected = logps_of(model, pairs)
        (chosen - rejected).sum().backward()
    assert widest.elements == chunk * vocabulary


@torch.no_grad()
def test_bfloat16_models_are_summed_in_float32():
    model, (pair,) = tiny_qwen2().bfloat16(), encoded_pairs([(3, 50, 1)])
    logits = model(torch.tensor([pair.prompt + pair.chosen])).logits[0]
    exact = logits.double().log_softmax(-1)[2:-1].gather(1, torch.tensor(pair.chosen)[:, None]).sum()
    torch.testing.assert_close(logps_of(plain(model), [pair])[0][0].double(), exact, rtol=1e-6, atol=0)


@torch.no_grad()
def test_bfloat16_drifts_little():
    """Rounding of the model itself: per token about 2 % of what a token costs, and unbiased."""
    model, pairs = tiny_qwen2(), encoded_pairs([(30, 80, 90)] * 20)
    rounded = model.bfloat16()
    tokens = torch.tensor([len(pair.chosen) for pair in pairs])
    drift = (logps_of(shared(rounded), pairs)[0] - logps_of(shared(rounded.float()), pairs)[0]) / tokens
    assert drift.abs().max() < 0.02


def test_the_head_is_the_models_own_parameter_and_still_answers_with_logits():
    for make in MODELS.values():
        model = make()
        names, ids = list(model.state_dict()), torch.tensor([[1, 2, 3]])
        logits = model(ids).logits
        wrapped = LogpsModel(model, max_length=128)
        assert list(model.state_dict()) == names
        assert {name.removeprefix("model.") for name, _ in wrapped.named_parameters()} == dict(
            model.named_parameters()
        ).keys()
        torch.testing.assert_close(model(ids).logits, logits)


def test_models_that_a_mask_would_wrong_take_plain_rows():
    for implementation in ("sdpa", "flex_attention"):
        assert prefix_sharing_obstacle(Qwen2Config(attn_implementation=implementation), 2**15) is None
    narrow = MistralConfig(sliding_window=1024, attn_implementation="sdpa")
    assert prefix_sharing_obstacle(narrow, 1024) is None
    assert "1024" in prefix_sharing_obstacle(narrow, 1025)
    for implementation in ("eager", "flash_attention_2"):
        assert implementation in prefix_sharing_obstacle(GPT2Config(attn_implementation=implementation), 128)


def test_a_narrow_sliding_window_is_scored_right_and_said_once(caplog):
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=8, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model, pairs = MistralForCausalLM(config).eval(), encoded_pairs([(20, 12, 5), (3, 4, 30)])
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        ours = logps_of(shared(model), pairs)
        shared(model)
    assert [record.message for record in caplog.records if record.name == "bdpo.models.loading"] == [
        "a row for each response instead of one for both: the sliding window of 8 tokens is shorter than "
        "data.max_length=128"
    ]
    for side, naive in zip(ours, naive_pairs(model, pairs), strict=True):
        torch.testing.assert_close(side.double(), naive, rtol=1e-5, atol=0)
    forced = shared(model)
    forced.layout = RowLayout(forced.layout.hidden_size, shared=True)
    with torch.no_grad():  # what the mask would do
        assert (logps_of(forced, pairs)[0] - ours[0]).abs()[0] > 0.1
