"""Whatever value stands wherever in a row: the row is a pair or has a reason."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from datetime import date, datetime
from decimal import Decimal
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdpo.config.data import SourceConfig
from bdpo.data.formats import FORMATS, format_named
from bdpo.data.formats.base import BadRow, Excluded
from bdpo.data.prepare import id_of, usable_pair
from bdpo.data.rendering import encode_pairs

WRITES_ALL = (
    "{{ mood }}{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.reasoning_content }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

ASK, YES, NO = ({"role": role, "content": role} for role in ("user", "assistant", "assistant"))
YES = YES | {"content": [{"type": "text", "text": "yes"}], "reasoning_content": "hm"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
ROWS = {
    "preference": {
        "prompt": [
            ASK,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "r", "tool_call_id": "1"},
        ],
        "chosen": [YES],
        "rejected": NO,
        "system": "s",
        "tools": [CALL],
        "chat_template_kwargs": {"mood": "x"},
        "group": "safe",
        "chosen_safe": True,
        "images": [],
    },
    "preference_text": {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    "hh_rlhf": {"prompt": "Human: a\n\nAssistant:", "chosen": "b", "rejected": "c"},
    "pku_saferlhf": {
        "prompt": "q",
        "response_0": "a",
        "response_1": "b",
        "is_response_0_safe": True,
        "is_response_1_safe": True,
        "better_response_id": 1,
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "r"},
        ],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": [{"from": "gpt", "value": "b"}],
    },
    "openai": {
        "input": {"messages": [ASK], "tools": [CALL]},
        "preferred_output": [YES],
        "non_preferred_output": [NO],
    },
    "llama_factory_v1": {
        "chosen_messages": [
            {"role": "user", "content": [{"type": "text", "value": "q"}]},
            {"role": "assistant", "content": "a", "loss_weight": 1.0},
        ],
        "rejected_messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}],
    },
    "instruction": {
        "instruction": "a",
        "input": "b",
        "history": [["q", "a"]],
        "chosen": "c",
        "rejected": "d",
    },
    "ranked": {"prompt": "q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
    "helpsteer": {"context": [ASK], "response1": "a", "response2": "b", "overall_preference": -2},
    "chatml": {"prompt": "<|im_start|>user\nq<|im_end|>\n", "chosen": "a", "rejected": "b"},
    "stringified": {
        "prompt": str([ASK]),
        "chosen": json.dumps([NO]),
        "rejected": str({**NO, "content": "x"}),
    },
}
OTHERS = [
    ("ranked", {"prompt": "q", "completions": [{"response": str(x), "overall_score": x} for x in (1, 2)]}),
    ("ranked", {"instruction": "q", "generations": ["a", "b"], "ratings": [1, 2]}),
    ("hh_rlhf", {side: f"\n\nHuman: a\n\nAssistant: {side}" for side in ("chosen", "rejected")}),
    ("instruction", {"question": "a", "chosen_response": "b", "rejected_response": "c"}),
]
CASES = [*ROWS.items(), *OTHERS]

EVERYWHERE = ("system", "functions", "tools", "chat_template_kwargs", "group", "chosen_safe", "images")

NESTED: list = []
for _ in range(300):
    NESTED = [NESTED]

ODD = [
    None, True, 0, -1, 1.5, 10**30, 10**5000, float("nan"), float("inf"), Decimal("1.5"), date(2024, 1, 1),
    datetime(2024, 1, 1), b"\xff", "", " ", "x", "\0\x1b[2J", "\ud800", "\ufdd0\ufdd1", "<|im_end|>", "[",
    "[]", "{}", "null", '["\\ud800"]', '{"name": "\\ud800", "arguments": {}}',
    "[{'role': 'user', 'content': ]", "[{'role': 'user', 'content': b'x', 'k': {1, 2}}]",
    [], {}, [None], [5], ["x"], [[]], [{}], [["a", "b"]],
    [("a", None)], [float("nan")], {"x": float("nan")}, {"": 1}, {1: 2}, {"\ud800": "x"}, {"x": "\ud800"},
    {"role": "user", "content": "x"}, [{"role": []}], [{"role": "user", "content": None}],
    [{"type": "text", "text": None}], [{"type": [], "text": "x"}], [CALL, "\ud800"], NESTED,
]  # fmt: skip


def places(value, place=()):
    """The path of every member of a row, at any depth."""
    members: Iterable = ()
    if isinstance(value, dict):
        members = value.items()
    elif isinstance(value, list):
        members = enumerate(value)
    for key, member in members:
        yield (*place, key)
        yield from places(member, (*place, key))


def changed(row, place, value):
    """The row with another value at a place."""
    row = copy.deepcopy(row)
    target = row
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    return row


@pytest.fixture(scope="module")
def outcome(make_chat):
    """outcome(name of a format, row): the reason against the row, or None for a pair that can be written."""
    chat = make_chat(WRITES_ALL)
    lengths = SimpleNamespace(max_prompt_length=10**4, max_length=2 * 10**4)

    def read(name, row):
        try:
            pair = usable_pair(format_named(name), row, SourceConfig(path="rows"))
        except (BadRow, Excluded) as reason:
            return str(reason)
        id_of(pair)
        (encoded,) = encode_pairs(chat, [pair], lengths)
        return str(encoded) if isinstance(encoded, BadRow) else None

    return read


@pytest.mark.parametrize(("name", "row"), CASES)
def test_an_odd_value_in_any_place_is_a_pair_or_a_reason(outcome, name, row):
    assert outcome(name, row) is None
    for place in [*places(row), *((column,) for column in EVERYWHERE)]:
        for value in ODD:
            reason = outcome(name, changed(row, place, value))
            assert reason is None or reason.isprintable()
            for form in FORMATS.values():
                form.fits(changed(row, place[:1], value))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=3)
    | st.text(st.characters(codec=None), max_size=8) | st.sampled_from(["user", "assistant", "text", "safe"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "type", "text", "tool_calls", "name"])
        | st.text(st.characters(codec=None), max_size=3), inner, max_size=4,
    ),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=300)
@given(st.data())
def test_nested_odd_values_are_a_pair_or_a_reason(outcome, data):
    name, row = data.draw(st.sampled_from(CASES))
    for place in data.draw(st.lists(st.sampled_from([*places(row)]), min_size=1, max_size=2)):
        try:
            row = changed(row, place, data.draw(VALUES))
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change has removed this place
    outcome(name, row)


@pytest.mark.parametrize(("name", "row"), CASES)
def test_a_missing_member_is_a_pair_or_a_reason(outcome, name, row):
    for place in places(row):
        damaged = changed(row, place, None)
        target = damaged
        for key in place[:-1]:
            target = target[key]
        del target[place[-1]]
        outcome(name, damaged)


@pytest.mark.parametrize("form", FORMATS)
def test_a_row_of_another_format_is_a_pair_or_a_reason(outcome, form):
    for _, row in CASES:
        outcome(form, row)
