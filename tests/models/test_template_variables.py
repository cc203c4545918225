"""What a chat template reads and does not assign: by hand for the shapes of real ones, and by what it renders."""

# ruff: noqa: E501 (templates are easier to read unbroken)
from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import trl
from jinja2 import TemplateError
from jinja2.meta import find_undeclared_variables
from transformers import PreTrainedTokenizerBase

from bdpo.config.model import RESERVED_TEMPLATE_KWARGS
from bdpo.models.template_variables import free_names
from bdpo.models.transformers_private import parsed_template
from tests.support.chats import byte_tokenizer
from tests.support.template_shapes import CONVERSATION


def free_in(text):
    return free_names(parsed_template(text))


def render(text, **variables):
    """What the template makes of a conversation, or the kind of its refusal."""
    try:
        return byte_tokenizer().apply_chat_template(
            CONVERSATION, chat_template=text, tokenize=False, add_generation_prompt=True, **variables
        )
    except (TemplateError, TypeError) as error:
        return type(error)


# Shapes of published templates, in wording of our own, and the names that a user may set.
SHAPES = {
    "Qwen3": (
        "{%- set ns = namespace(searching=true, last=messages|length - 1) %}"
        "{%- for m in messages[::-1] %}{%- if ns.searching and m.role == 'user' %}"
        "{%- set ns.searching = false %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
        "{%- for m in messages %}"
        "{%- if m.content is string %}{%- set content = m.content %}{%- else %}{%- set content = '' %}{%- endif %}"
        "{%- set thoughts = '' %}"
        "{%- if m.reasoning_content is string %}{%- set thoughts = m.reasoning_content %}{%- endif %}"
        "{{ thoughts }}{{ content }}{%- for call in m.tool_calls or [] %}{{ call | tojson }}{%- endfor %}{%- endfor %}"
        "{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}!{%- endif %}",
        {"enable_thinking"},
    ),
    "Llama 3.2": (
        "{{- bos_token }}{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}"
        "{%- if not tools_in_user_message is defined %}{%- set tools_in_user_message = true %}{%- endif %}"
        "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}"
        "{%- endif %}{%- endif %}{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
        "{%- if messages[0].role == 'system' %}{%- set system_message = messages[0].content %}"
        "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
        "{{ date_string }}{{ system_message }}{%- if tools_in_user_message and tools is not none %}{{ tools }}"
        "{%- endif %}",
        {"custom_tools", "tools_in_user_message", "date_string"},
    ),
    "Command-R": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}"
        "{% set system = messages[0].content %}{% elif false == true %}{% set turns = messages %}"
        "{% set system = 'Be kind.' %}{% else %}{% set turns = messages %}{% set system = false %}{% endif %}"
        "{% if system != false %}{{ system }}{% endif %}{{ safety_mode or 'strict' }}"
        "{% for m in turns %}{% set content = m.content %}{{ content.strip() }}{% endfor %}",
        {"safety_mode"},
    ),
    "gpt-oss": (
        "{%- macro typed(spec, required, nullable=false) %}{%- if spec.items %}{%- set inner = typed(spec.items, []) %}"
        "{{ inner }}{%- else %}{{ spec }}{{ note(required) }}{{ nullable }}{%- endif %}{%- endmacro %}"
        "{%- macro note(text) %}{{ text }}{{ varargs }}{%- endmacro %}"
        "{%- if model_identity is not defined %}{%- set model_identity = 'a model' %}{%- endif %}"
        "{%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'medium' %}{%- endif %}"
        "{{ model_identity }}{{ reasoning_effort }}{%- if builtin_tools %}{{ typed(builtin_tools, []) }}{%- endif %}"
        "{%- set last = namespace(name=none) %}{%- for m in messages %}{%- if 'tool_calls' in m %}"
        "{%- set call = m.tool_calls[0] %}{%- set last.name = call.name %}{{ call.arguments | tojson }}"
        "{%- elif m.role == 'tool' %}{%- if last.name is none %}{{ raise_exception('no call') }}{%- endif %}"
        "{{ last.name }}{%- endif %}{%- endfor %}",
        {"model_identity", "reasoning_effort", "builtin_tools"},
    ),
    "Gemma": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% set role = 'model' %}{% else %}"
        "{% set role = m.role %}{% endif %}{{ role }}{% endfor %}",
        set(),
    ),
    "a branch that ends the rendering": (
        "{% if messages %}{% set first = messages[0] %}{% elif tools %}{{ raise_exception('no turns') }}{% else %}"
        "{{ 'x' ~ raise_exception('nothing') }}{% endif %}{{ first }}",
        set(),
    ),
    "a default system prompt": (
        "{% if messages[0].role == 'system' %}{% set system_message = messages[0].content %}{% endif %}"
        "{% if system_message is defined %}{{ system_message }}{% endif %}",
        {"system_message"},
    ),
    "a name of a loop or a macro, read outside": (
        "{% for tone in [1] %}{{ tone }}{% endfor %}{{ tone }}{% macro f(style) %}{{ style }}{% endmacro %}{{ f(style) }}",
        {"tone", "style"},
    ),
    "blocks of other kinds": (
        "{% set text %}{{ words }}{% endset %}{{ text }}{% with a = b %}{{ a }}{% endwith %}{{ a }}"
        "{% filter upper %}{{ shouted }}{% endfilter %}{% generation %}{{ text }}{{ seen }}{% endgeneration %}"
        "{% set x, y = pair %}{{ x }}{{ y }}",
        {"words", "b", "a", "shouted", "seen", "pair"},
    ),
}

BROUGHT = {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"}


@pytest.mark.parametrize("name", SHAPES)
def test_what_a_user_may_set(name):
    template, free = SHAPES[name]
    assert free_in(template) - BROUGHT == free


TRL = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


@pytest.mark.parametrize("file", TRL, ids=lambda file: file.stem)
def test_no_name_of_jinjas_that_is_left_out_has_an_effect(file):
    """Jinja names at least all that a template reads; the others change nothing, whatever is set."""
    text = file.read_text(encoding="utf-8")
    reported = find_undeclared_variables(parsed_template(text))
    free = free_in(text)
    assert free <= reported
    for name in reported - free:
        assert render(text, **{name: "bdpo"}) == render(text)


def test_no_variable_of_a_template_may_be_an_argument_of_its_rendering():
    """Of apply_chat_template as it is installed: such a key would never reach the template."""
    arguments = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    assert arguments - {"self", "kwargs"} <= RESERVED_TEMPLATE_KWARGS
