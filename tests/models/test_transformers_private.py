"""What is used of transformers beyond its documented interface does what its public functions do."""

from __future__ import annotations

import re
import tomllib

import pytest
from jinja2 import TemplateError
from packaging.requirements import Requirement
from transformers import AutoModelForCausalLM, LlamaConfig, MptConfig

from bdpo.models import transformers_private
from bdpo.models.transformers_private import (
    attention_of_config,
    parsed_template,
    set_attention,
    supports_sdpa,
)
from tests.support import ROOT
from tests.support.chats import byte_tokenizer

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
