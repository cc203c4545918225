"""What is used of transformers beyond its documented interface does what its public functions do."""

from __future__ import annotations

import re
import tomllib

import pytest
import torch
from jinja2 import TemplateError
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MptConfig

from bdpo.models import transformers_private
from bdpo.models.transformers_private import (
    attention_of_config,
    parsed_template,
    places_of,
    set_attention,
    supports_sdpa,
    text_renderer,
)
from tests.support import ROOT
from tests.support.architectures import tiny
from tests.support.chats import byte_tokenizer
from tests.support.template_shapes import ANSWER, SHAPES

TINY = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 9,
}


def test_the_range_that_is_admitted_is_the_range_that_was_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ranged,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "transformers")
    tested = re.search(r"transformers 5\.(\d+) to 5\.(\d+)", transformers_private.__doc__)
    lowest, highest = int(tested[1]), int(tested[2])
    assert set(map(str, ranged.specifier)) == {f">=5.{lowest}", f"<5.{highest + 1}"}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_is_built_with_the_attention_that_is_set(attention):
    shape = LlamaConfig(**TINY)
    set_attention(shape, attention)
    assert attention_of_config(shape) == attention
    assert attention_of_config(AutoModelForCausalLM.from_config(shape).config) == attention


def test_an_architecture_without_sdpa_is_known():
    assert supports_sdpa(LlamaConfig())
    assert not supports_sdpa(MptConfig())
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        AutoModelForCausalLM.from_config(MptConfig(), attn_implementation="sdpa")


def test_a_template_is_parsed_as_it_is_rendered():
    """With the statements and functions that transformers adds to Jinja."""
    text = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endfor %}{{ raise_exception is defined and strftime_now is defined }}"
    )
    assert (
        byte_tokenizer().apply_chat_template(
            [{"role": "user", "content": text} for text in "ab"], chat_template=text, tokenize=False
        )
        == "aTrue"
    )
    assert {"raise_exception", "strftime_now", "namespace"} <= parsed_template(
        text
    ).environment.globals.keys()


def test_a_text_that_is_no_template_is_refused():
    with pytest.raises(TemplateError):
        parsed_template("{% for")


@pytest.mark.parametrize("name", SHAPES)
def test_texts_are_rendered_as_by_transformers(name):
    shape = SHAPES[name]
    tokenizer, answer = shape.tokenizer(), {"role": "assistant", "content": ANSWER}
    render = text_renderer(tokenizer, shape.template, shape.kwargs)
    for messages in (shape.messages, [*shape.messages, answer], shape.messages):
        for generate in (True, False):
            assert render(messages, generate) == tokenizer.apply_chat_template(
                messages,
                chat_template=shape.template,
                tokenize=False,
                add_generation_prompt=generate,
                **shape.kwargs,
            )


def test_a_template_of_texts_sees_the_variables_that_transformers_gives_it():
    """Those that are not set, too, and a class that no template may see; what it assigns is gone with it."""
    text = (
        "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ tools is none }}{{ documents is none }}{{ kind }}"
        "{% if kept is defined %}again{% endif %}{% set kept = namespace(a=1) %}{{ kept.a }}{{ path }}"
        "{{ messages | tojson }}{% generation %}{{ add_generation_prompt }}{% endgeneration %}"
    )
    tokenizer, variables = byte_tokenizer(), {"kind": "own", "eos_token": "<end>", "path": ROOT}
    render, messages = text_renderer(tokenizer, text, variables), [{"role": "user", "content": "é<a>"}]
    right = tokenizer.apply_chat_template(
        messages, chat_template=text, tokenize=False, add_generation_prompt=True, **variables
    )
    assert render(messages, True) == render(messages, True) == right
    assert "<s><end>" in right
    assert str(ROOT) not in right
    assert tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False, **variables) != right


def test_a_template_of_texts_changes_no_message():
    text, messages = "{{ messages.append(messages[0]) }}", [{"role": "user", "content": "a"}]
    render = text_renderer(byte_tokenizer(), text, {})
    with pytest.raises(TemplateError):
        render(messages, True)
    assert messages == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "mixtral", "qwen3_moe", "granitemoe"])
def test_a_tensor_has_the_place_that_from_pretrained_gives_it(tmp_path, model_type):
    """Each tensor of a file is set to a number of its own, which is found again in its place."""
    tiny(model_type).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    saved = load_file(file)
    marks = {name: float(mark) for mark, name in enumerate(sorted(saved), 1)}
    save_file({name: torch.full_like(saved[name], marks[name]) for name in saved}, file, {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    places = places_of(model, [*saved, "of.no.place"])
    assert sorted(name for of in places.values() for names in of.values() for name in names) == sorted(saved)
    state = model.state_dict()
    for place, patterns in places.items():
        expected = [marks[name] for names in zip(*patterns.values(), strict=True) for name in names]
        found = state[place].unique_consecutive().tolist()
        assert found == expected
        merged = len(expected) > 1
        assert all(("*" in pattern) == merged for pattern in patterns)


def test_a_name_may_lack_the_prefix_of_the_base_model():
    model = tiny("llama")
    assert places_of(model, ["norm.weight"]) == {"model.norm.weight": {"model.norm.weight": ["norm.weight"]}}
