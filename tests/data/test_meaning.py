"""Nothing that changes the meaning of a row vanishes: it is honoured, it is a reason, or it is named."""

from __future__ import annotations

import json
from datetime import datetime
from decimal import Decimal

import pytest

from bdpo.config import DataConfig
from bdpo.data.prepare import prepare
from tests.support.chats import CHATML
from tests.support.data_files import pair_row, write_jsonl, write_parquet

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Ulm"}}}

KNOWS_ALL = (
    "{{ '!' if shout else '' }}{% if tools %}<|header|>tools {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}({{ c.function.name }}){% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(text="q"):
    return {"role": "user", "content": text}


def assistant(text, **others):
    return {"role": "assistant", "content": text, **others}


def conversation(prompt=None, chosen=None, rejected=None, **columns):
    return {
        "prompt": prompt or [user()],
        "chosen": [chosen or assistant("yes")],
        "rejected": [rejected or assistant("no")],
        **columns,
    }


@pytest.fixture
def prepare_with(tmp_path, make_chat, kept_pairs):
    """prepare_with(template, rows or file): the account, and the three texts of each pair but the last.

    Rows get a sound one behind them.
    """

    def prepared(template, rows):
        chat = make_chat(template)
        if isinstance(rows, list):
            rows = write_jsonl(tmp_path / "rows.jsonl", [*rows, pair_row("sound")])
        config = DataConfig(path=str(rows), max_bad_fraction=1.0)
        account = prepare(config, chat, tmp_path / "pairs", tmp_path / "private", 0)
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        return account, [
            [chat.tokenizer.decode(pair[name]) for name in columns] for pair in kept_pairs()[:-1]
        ]

    return prepared


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (conversation(tools=TOOLS), "tools: not written by the chat template"),
        (conversation(tools=json.dumps(TOOLS)), "tools: not written by the chat template"),
        (conversation(functions=TOOLS), "tools: not written by the chat template"),
        (
            conversation([user(), assistant("", tool_calls=[CALL]), user()]),
            "prompt: tool_calls is not written by the chat template",
        ),
        (
            conversation([user(), assistant("a", reasoning_content="hm"), user()]),
            "prompt: reasoning_content is not written by the chat template",
        ),
        (
            conversation(chosen=assistant("yes", reasoning_content="hm")),
            "chosen: reasoning_content is not written by the chat template",
        ),
        (
            conversation(chat_template_kwargs={"enable_thinking": False}),
            "chat_template_kwargs: holds an argument that the chat template does not read",
        ),
        (
            conversation(chat_template_kwargs={"messages": []}),
            "chat_template_kwargs: holds an argument that the chat template does not read",
        ),
        (conversation(images=["a.png"]), "images: not empty, and only text is read"),
        (
            conversation([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}]),
            "prompt: a content part is not text, and only text is read",
        ),
        (
            conversation([{"role": "user", "content": [{"type": "poem", "text": "q"}]}]),
            "prompt: unknown type of content part",
        ),
        (
            conversation([{"role": "system", "content": "A"}, user()], system="B"),
            "system: the conversation begins with another system turn",
        ),
        (conversation(tools="nope"), "tools: neither a list nor JSON of one"),
        (conversation(tools={"a": 1}), "tools: wrong type"),
        (conversation(tools=json.loads("[" * 500 + "]" * 500)), "tools: nested too deeply"),
        (conversation(tools="[" * 99_999 + "]" * 99_999), "tools: neither a list nor JSON of one"),
        (conversation(tools='[{"name": "a", "name": "b"}]'), "tools: a key stands twice in its JSON"),
        (conversation(tools=TOOLS, functions=[CALL]), "tools: tools and functions are two different lists"),
    ],
)
def test_what_cannot_be_honoured_is_a_reason(prepare_with, row, reason):
    account, kept = prepare_with(CHATML, [row])
    assert (dict(account.quarantined), kept) == ({reason: 1}, [])


@pytest.mark.parametrize("nothing", ["null", " null ", "[]", "", None])
def test_tools_that_are_the_json_of_nothing_are_none(prepare_with, nothing):
    account, kept = prepare_with(CHATML, [conversation(tools=nothing)])
    assert (account.quarantined.total(), len(kept)) == (0, 1)


def test_text_parts_are_read_as_the_text_that_they_make(prepare_with):
    """In every message and under every name that publishers give them, they are joined as they stand."""
    in_parts = conversation(
        [
            {
                "role": "system",
                "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}],
            },
            {"role": "user", "content": ["Tie ", {"type": "input_text", "text": "a"}, {"text": " knot"}]},
        ],
        assistant([{"type": "output_text", "text": "Cross "}, {"type": "text", "value": "the ends."}]),
        assistant([{"type": "text", "text": "no"}]),
    )
    plain = conversation(
        [{"role": "system", "content": "Be kind."}, user("Tie a knot")], assistant("Cross the ends.")
    )
    account, kept = prepare_with(CHATML, [in_parts])
    assert (account.quarantined, [kept]) == ({}, [prepare_with(CHATML, [plain])[1]])
    assert "system\nBe kind.<|im_end|>\n<|im_start|>user\nTie a knot<|im_end|>" in kept[0][0]
    assert kept[0][1] == "Cross the ends.<|im_end|>"


def test_tools_are_written_by_a_template_that_knows_them(prepare_with):
    _, kept = prepare_with(
        KNOWS_ALL, [conversation(tools=TOOLS), conversation(tools=[]), conversation(tools=None)]
    )
    assert len(kept) == 2  # without tools the second and third are the same pair
    assert "<|header|>tools" in kept[0][0]
    assert "weather" in kept[0][0]
    assert "tools" not in kept[1][0]


def test_tool_calls_and_turns_of_tools_are_written(prepare_with, kept_pairs):
    prompt = [
        user(),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "content": "rain", "tool_call_id": "1"},
    ]
    account, kept = prepare_with(KNOWS_ALL, [conversation(prompt)])
    assert "(weather)<|im_end|>\n<|im_start|>tool\nrain<|im_end|>" in kept[0][0]
    assert account.sources[0].unread == {"prompt[].tool_call_id"}
    assert json.loads(kept_pairs()[0]["context"])["messages"][1]["tool_calls"] == [CALL]


def test_reasoning_of_a_response_is_written(prepare_with):
    row = conversation(chosen=assistant("yes", reasoning_content="hm"))
    _, kept = prepare_with(KNOWS_ALL, [row])
    assert kept[0][1:] == ["[hm]yes<|im_end|>", "no<|im_end|>"]


def test_arguments_of_a_row_reach_the_template(prepare_with):
    _, kept = prepare_with(KNOWS_ALL, [conversation(chat_template_kwargs={"shout": True}), conversation()])
    assert [prompt.startswith("!") for prompt, _, _ in kept] == [True, False]


@pytest.mark.parametrize("name", ["role", "add_gen", "thinking", "bos_token", "content", "messages"])
def test_an_argument_is_a_variable_that_the_template_reads(prepare_with, name):
    """Parts of names, attributes, local variables and what every rendering decides are none."""
    template = (
        "{{ bos_token }}{% set enable_thinking = enable_thinking or false %}{{ '!' if enable_thinking }}"
        "{% if messages %}{% set content = '' %}{% else %}{% set content = '' %}{% endif %}{{ content }}"
        + CHATML
    )
    rows = [
        conversation(chat_template_kwargs={name: True}),
        conversation(chat_template_kwargs={"enable_thinking": 1}),
    ]
    account, kept = prepare_with(template, rows)
    assert dict(account.quarantined) == {
        "chat_template_kwargs: holds an argument that the chat template does not read": 1
    }
    assert ["!" in prompt for prompt, _, _ in kept] == [True]


@pytest.mark.parametrize("text", ["First?", " Second?\n", ""])
def test_a_prompt_that_repeats_a_turn_is_redundant(prepare_here, kept_pairs, text):
    shared = [user("First?"), assistant("Well."), user("Second?")]
    row = {"chosen": [*shared, assistant("yes")], "rejected": [*shared, assistant("no")]}
    prepare_here([row | {"prompt": text}])
    assert [turn["content"] for turn in kept_pairs()[0]["prompt"]] == ["First?", "Well.", "Second?"]


def test_what_stands_in_the_input_of_openai_is_read_or_named(prepare_here, kept_pairs):
    given = {"messages": [user()], "system": "Be brief.", "response_format": {"type": "json"}, "seed": None}
    account = prepare_here(
        [{"input": given, "preferred_output": [assistant("a")], "non_preferred_output": [assistant("b")]}]
    )
    assert [turn["content"] for turn in kept_pairs()[0]["prompt"]] == ["Be brief.", "q"]
    assert account.sources[0].unread == {"input.response_format"}


def test_keys_of_ranked_answers_without_effect_are_named(prepare_here):
    answers = [{"answer": "a", "rank": 1, "model": "m", "images": []}, {"answer": "b", "rank": 2}]
    assert prepare_here([{"prompt": "q", "answers": answers}]).sources[0].unread == {"answers[].model"}


def test_a_turn_that_the_template_drops_is_a_reason(prepare_with):
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    account, _ = prepare_with(template, [pair_row(0, system="Be brief.")])
    assert dict(account.quarantined) == {"prompt: a system turn is not written by the chat template": 1}


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        (
            CHATML.replace("in messages %}", "in messages if m.role != 'system' %}", 1),
            pair_row(0, system="Be brief.", prompt="Be brief. Why?"),
            "prompt: a system turn is not written by the chat template",
        ),
        (
            CHATML.replace("in messages %}", "in messages if m.role != 'system' %}", 1),
            pair_row(0, system="user", prompt="Why?"),
            "prompt: a system turn is not written by the chat template",
        ),
        (
            CHATML.replace("in messages %}", "in messages if m != messages[0] or not messages[2:] %}", 1),
            conversation([user("Why?"), assistant("Well."), user("Why? And how?")]),
            "prompt: a user turn is not written by the chat template",
        ),
        (
            "{{ tools | tojson if tools }}"
            + CHATML.replace("in messages %}", "in messages if not (tools and m.role == 'system') %}", 1),
            conversation([{"role": "system", "content": "weather"}, user()], tools=TOOLS),
            "prompt: a system turn is not written by the chat template",
        ),
    ],
)
def test_a_dropped_turn_is_seen_where_its_text_stands_elsewhere(prepare_with, template, row, reason):
    """In another turn, in the template's own words, or in the tools."""
    account, kept = prepare_with(template, [row])
    assert (dict(account.quarantined), kept) == ({reason: 1}, [])


def test_an_answer_of_the_history_that_the_template_drops_is_a_reason(prepare_with):
    template = CHATML.replace(
        "in messages %}", "in messages if m.role != 'assistant' or m == messages[-1] %}", 1
    )
    rows = [conversation([user("Hi"), assistant("Yes?"), user("Why?")]), conversation()]
    account, kept = prepare_with(template, rows)
    reason = "prompt: an assistant turn is not written by the chat template"
    assert (dict(account.quarantined), len(kept)) == ({reason: 1}, 1)


def test_the_text_beside_a_call_of_a_tool_may_be_left_out(prepare_with):
    """As in Mistral's template, which writes the call alone."""
    template = KNOWS_ALL.replace("{{ m.content }}", "{{ m.content if not m.tool_calls }}")
    prompt = [user(), assistant("I look.", tool_calls=[CALL]), {"role": "tool", "content": "rain"}]
    account, kept = prepare_with(template, [conversation(prompt)])
    assert (account.quarantined.total(), len(kept), account.sources[0].changed_by_template) == (0, 1, 1)


def test_equal_turns_that_the_template_writes_are_kept(prepare_with):
    row = conversation([{"role": "system", "content": "x"}, user("x"), assistant("x"), user("x")])
    account, kept = prepare_with(CHATML, [row])
    assert (account.quarantined.total(), len(kept)) == (0, 1)


@pytest.mark.parametrize("text", ["\ufdd0\ufdd1", "a\ufdd0b", "\ufdd1"])
@pytest.mark.parametrize("key", ["reasoning_content", "tools", "kwargs"])
def test_noncharacters_beside_the_contents_are_a_reason(prepare_with, key, text):
    """They would be taken out as the guards of control tokens are."""
    row = {
        "reasoning_content": conversation(chosen=assistant("yes", reasoning_content=text)),
        "tools": conversation(tools=[{"name": text}]),
        "kwargs": conversation(chat_template_kwargs={"shout": text}),
    }[key]
    account, kept = prepare_with(KNOWS_ALL, [row])
    reason = "prompt: the noncharacters U+FDD0 and U+FDD1 in tools, arguments or keys of a message"
    assert (dict(account.quarantined), kept) == ({reason: 1}, [])


# Only the roles that a template names have turns of their own: the branch that is left takes all others.
ELSE_BRANCHES = {
    "assistant": CHATML.replace("{{ m.role }}", "{{ 'user' if m.role == 'user' else 'assistant' }}"),
    "user": CHATML.replace("{{ m.role }}", "{{ 'assistant' if m.role == 'assistant' else 'user' }}"),
}

OTHER_TURNS = {
    "system": [{"role": "system", "content": "Be brief."}, user()],
    "developer": [{"role": "developer", "content": "Be brief."}, user()],
    "tool": [user(), assistant("Let me look."), {"role": "tool", "content": "rain", "name": "weather"}],
}


@pytest.mark.parametrize("role", OTHER_TURNS)
@pytest.mark.parametrize("speaker", ELSE_BRANCHES)
def test_a_turn_that_becomes_words_of_another_speaker_is_a_reason(prepare_with, speaker, role):
    account, kept = prepare_with(ELSE_BRANCHES[speaker], [conversation(OTHER_TURNS[role])])
    reason = f"prompt: a {role} turn, which the chat template writes as the {speaker}'s"
    assert (dict(account.quarantined), kept) == ({reason: 1}, [])


def test_a_later_system_turn_may_be_written_as_anothers_where_the_first_is_not(prepare_with):
    """Templates that look for a system turn at the beginning alone."""
    template = ELSE_BRANCHES["user"].replace(
        "'user' }}", "'system' if loop.first and m.role == 'system' else 'user' }}"
    )
    later = [user(), assistant("a"), {"role": "system", "content": "Be brief."}, user()]
    account, kept = prepare_with(template, [conversation(OTHER_TURNS["system"]), conversation(later)])
    assert account.quarantined.total() == 1
    assert ["system\nBe brief." in prompt for prompt, _, _ in kept] == [True]


@pytest.mark.parametrize("role", OTHER_TURNS)
def test_a_turn_that_the_template_tells_from_all_others_is_kept(prepare_with, role):
    """With turns of its own, or in a frame inside the user's, as Qwen writes what a tool says."""
    framed = ELSE_BRANCHES["user"].replace(
        "{{ m.content }}", "{{ m.content if m.role in ('user', 'assistant') else '(' ~ m.content ~ ')' }}"
    )
    for template in (CHATML, framed):
        account, kept = prepare_with(template, [conversation(OTHER_TURNS[role])])
        assert (account.quarantined.total(), len(kept)) == (0, 1)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (conversation(chat_template_kwargs={"shout": float("nan")}), "chat_template_kwargs: "),
        (conversation(tools=[{"limit": float("inf")}]), "tools: "),
        (
            conversation([user(), assistant("", tool_calls=[{"function": {"x": float("nan")}}]), user()]),
            "prompt: ",
        ),
    ],
)
def test_a_number_that_json_cannot_hold_is_a_reason(prepare_with, row, reason):
    account, _ = prepare_with(KNOWS_ALL, [row])
    assert dict(account.quarantined) == {f"{reason}holds a number that is not finite": 1}


def test_the_null_of_pandas_is_a_null(prepare_with):
    nulls = dict.fromkeys(("system", "tools", "group", "chosen_safe", "images"), float("nan"))
    account, kept = prepare_with(CHATML, [conversation(**nulls)])
    assert (account.quarantined.total(), len(kept)) == (0, 1)


def test_keys_that_only_columnar_files_have_are_read_as_texts(prepare_with, tmp_path, kept_pairs):
    """Times of messages, for one, which published conversations have; pandas' NaN is a null."""
    turn = user() | {"timestamp": datetime(2024, 1, 1), "price": Decimal("1.50"), "score": float("nan")}
    row = conversation([turn, assistant("a"), user()])
    file = write_parquet(tmp_path / "rows.parquet", [row])
    account, _ = prepare_with(KNOWS_ALL, file)
    assert (account.kept, account.sources[0].unread) == (1, {"prompt[].timestamp", "prompt[].price"})
    context = json.loads(kept_pairs()[0]["context"])
    assert context["messages"][0] == user() | {"timestamp": "2024-01-01 00:00:00", "price": "1.50"}


def test_two_rows_that_differ_in_tools_alone_are_two_pairs(prepare_with, kept_pairs):
    account, _ = prepare_with(KNOWS_ALL, [conversation(), conversation(tools=TOOLS)])
    assert (account.kept, len({pair["pair_id"] for pair in kept_pairs()})) == (3, 3)


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_is_the_first_message(prepare_here, kept_pairs, column):
    rows = [pair_row(0, **{column: "Be brief."}), pair_row(1, **{column: ""}), pair_row(2, **{column: None})]
    rows.append(
        pair_row(3, prompt=[{"role": "system", "content": "Be brief."}, user()], **{column: "Be brief."})
    )
    prepare_here(rows)
    roles = [[message["role"] for message in pair["prompt"]] for pair in kept_pairs()]
    assert roles == [["system", "user"], ["user"], ["user"], ["system", "user"]]


def test_columns_and_keys_without_effect_are_named(prepare_here):
    rows = [pair_row(0, note="x", score=1.0), conversation([user() | {"mood": "calm", "weight": None}])]
    assert prepare_here(rows).sources[0].unread == {"note", "score", "prompt[].mood"}


def test_the_name_of_a_column_cannot_move_the_cursor(prepare_here):
    account = prepare_here([pair_row(0, **{"\x1b[2Jred": 1, "long" * 40: 2})])
    assert all(name.isprintable() and len(name) < 70 for name in account.sources[0].unread)


def test_a_pair_that_is_empty_else_has_no_context(prepare_here, kept_pairs):
    prepare_here([pair_row(0)])
    assert kept_pairs()[0]["context"] is None


def test_a_key_that_the_template_does_not_write_makes_no_other_pair(prepare_with, kept_pairs):
    plain = conversation()
    others = [
        conversation([{**user(), "id": number}], assistant("yes", weight=number)) for number in range(2)
    ]
    account, kept = prepare_with(CHATML, [*others, plain])
    assert (dict(account.quarantined), len(kept)) == ({"duplicate": 2}, 1)
    assert account.sources[0].unread == {"prompt[].id", "chosen[].weight"}
    ids = {pair["pair_id"] for pair in kept_pairs()}
    prepare_with(CHATML, [plain])
    assert {pair["pair_id"] for pair in kept_pairs()} == ids


def test_a_key_that_the_template_writes_makes_another_pair(prepare_with):
    rows = [conversation(chosen=assistant("yes", reasoning_content=text)) for text in ("hm", "oh")]
    account, kept = prepare_with(KNOWS_ALL, rows)
    assert (dict(account.quarantined), len(kept)) == ({}, 2)


def test_of_two_keys_that_stand_for_each_other_one_is_written(prepare_with):
    template = CHATML.replace("{{ m.content }}", "{{ m.name or m.alias or '' }}{{ m.content }}")
    rows = [conversation([{**user(), "name": name, "alias": name}, assistant("a"), user()]) for name in "ab"]
    account, kept = prepare_with(template, rows)
    assert (dict(account.quarantined), len(kept)) == ({}, 2)
    assert account.sources[0].unread == {"prompt[].alias"}


NOTHING = {
    "function_call": {"name": None, "arguments": None},
    "images": [None],
    "image": {"bytes": None, "path": None},
    "reasoning_content": float("nan"),
}


@pytest.mark.parametrize("key", NOTHING)
@pytest.mark.parametrize("place", ["message", "row"])
def test_members_that_are_all_null_are_nothing(prepare_with, key, place):
    """Arrow gives every object the members of all, and pandas writes NaN for null."""
    row = conversation([{**user(), key: NOTHING[key]}]) if place == "message" else conversation()
    account, _ = prepare_with(CHATML, [row | ({key: NOTHING[key]} if place == "row" else {})])
    assert account.kept == 2


@pytest.mark.parametrize("part", [{"image_url": {"url": "x"}}, {"type": "text", "image": "x.png"}])
def test_a_content_part_with_more_than_its_text_is_a_reason(prepare_with, part):
    account, _ = prepare_with(CHATML, [conversation([user([{"text": "q", **part}])])])
    assert account.quarantined == {"prompt: a content part with a key that is not read": 1}


@pytest.mark.parametrize("given", [{"type": "text", "index": None}, {"type": "text", "annotations": ["a"]}])
def test_other_keys_of_a_content_part_are_no_part_of_its_text(prepare_with, given):
    account, _ = prepare_with(CHATML, [conversation([user([{"text": "q", **given}])])])
    assert account.kept == 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "q", "chosen": "a", "rejected": "b", "note": ' + "9" * 5000 + "}", "too many digits"),
        ('{"prompt": "q", "note": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ],
)
def test_json_that_python_does_not_read_is_not_called_something_else(prepare_with, tmp_path, line, reason):
    file = tmp_path / "odd.jsonl"
    file.write_text(json.dumps(pair_row("sound")) + f"\n{line}\n")
    account, _ = prepare_with(CHATML, file)
    assert [reason in found for found in account.quarantined] == [True]
