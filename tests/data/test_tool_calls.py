"""Arguments of tool calls are written once, as the chat template expects them: an object, or JSON."""

from __future__ import annotations

import json

import pytest

from bdpo.data.formats import FORMATS, read_pair
from bdpo.data.formats.base import BadRow
from bdpo.data.rendering import render_pair
from tests.support.chats import CHATML

TOWN = {"town": "Ulm", "day": None}

# How a template writes the arguments -> what it expects.
WRITES = {
    "{{ c.function.arguments | tojson }}": dict,
    "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}": dict,
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }};{% endfor %}": dict,
    "{{ '```' + c.function.arguments + '```' }}": str,
    "{{ '```' ~ c.function.arguments ~ '```' }}": str,
}


def calling(arguments, **keys):
    call = {"type": "function", "function": {"name": "rain", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call], **keys}


def openai(answer):
    return {
        "input": {"messages": [{"role": "user", "content": "Rain?"}]},
        "preferred_output": [answer],
        "non_preferred_output": [{"role": "assistant", "content": "No idea."}],
    }


def sharegpt(arguments):
    return {
        "conversations": [
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": json.dumps({"name": "rain", "arguments": arguments})},
            {"from": "observation", "value": "yes"},
        ],
        "chosen": {"from": "gpt", "value": "Yes."},
        "rejected": {"from": "gpt", "value": "No idea."},
    }


def template(writes):
    calls = f"{{% for c in m.tool_calls or [] %}}({{{{ c.function.name }}}} {writes}){{% endfor %}}<|im_end|>"
    return CHATML.replace("<|im_end|>", calls)


@pytest.mark.parametrize("writes", WRITES)
@pytest.mark.parametrize("given", [{"town": "Ulm"}, json.dumps(TOWN), json.dumps(TOWN, indent=1)])
def test_a_call_is_written_as_the_template_writes_what_it_expects(make_chat, writes, given):
    chat = make_chat(template(writes))
    pair = read_pair(FORMATS["openai"], openai(calling(given)))
    meant = TOWN if isinstance(given, str) else given
    expected = calling(json.dumps(meant) if WRITES[writes] is str else meant)
    turns = [{"role": "user", "content": "Rain?"}, expected]
    whole = chat.tokenizer.apply_chat_template(turns, tokenize=False)
    rendered = render_pair(chat, pair)
    assert whole == f"{rendered.prompt}{rendered.chosen}<|im_end|>\n"
    assert "Ulm" in rendered.chosen
    assert "\\" not in rendered.chosen


@pytest.mark.parametrize("given", [TOWN, json.dumps(TOWN)])
def test_the_turn_of_a_call_and_the_key_of_older_data_hold_an_object_too(given):
    """A null member of JSON is a value; of a columnar file it is a member that is not there."""
    pair = read_pair(FORMATS["sharegpt"], sharegpt(given))
    assert pair.prompt[1]["tool_calls"][0]["function"]["arguments"] == TOWN
    older = {
        "role": "assistant",
        "content": "",
        "function_call": {"name": "rain", "arguments": json.dumps(TOWN)},
    }
    pair = read_pair(FORMATS["openai"], openai(older))
    assert pair.chosen["function_call"]["arguments"] == TOWN


@pytest.mark.parametrize("given", ["Ulm", "", "[1]", "null", '"x"', '{"a": 1', "[" * 10**5])
def test_what_is_no_json_of_an_object_is_a_reason(given):
    reason = ": arguments of a tool call that are not JSON of an object"
    with pytest.raises(BadRow) as caught:
        read_pair(FORMATS["openai"], openai(calling(given)))
    assert str(caught.value) == f"preferred_output{reason}"
    with pytest.raises(BadRow) as caught:
        read_pair(FORMATS["sharegpt"], sharegpt(given))
    assert str(caught.value) == f"conversations{reason}"


def test_a_number_that_json_cannot_hold_is_a_reason():
    with pytest.raises(BadRow, match="preferred_output: holds a number that is not finite"):
        read_pair(FORMATS["openai"], openai(calling('{"a": NaN}')))
