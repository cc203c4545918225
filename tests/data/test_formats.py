"""Each format: a row by hand -> the pair it means; every way a row can be wrong has its own reason."""

from __future__ import annotations

import copy

import pytest

from bdpo.data.formats import FORMATS, detect, read_pair
from bdpo.data.formats.base import BadRow, Excluded
from bdpo.errors import UserError

USER = {"role": "user", "content": "How do I bake a plinth?"}

SYSTEM = {"role": "system", "content": "Be brief."}

YES = {"role": "assistant", "content": "Mix and bake."}

NO = {"role": "assistant", "content": "I would rather not."}

PREFERENCE = {"prompt": USER["content"], "chosen": NO["content"], "rejected": YES["content"]}

IMPLICIT = {"chosen": [SYSTEM, USER, NO], "rejected": [SYSTEM, USER, YES]}

SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "Hello"},
        {"from": "gpt", "value": "Hello!"},
        {"from": "human", "value": USER["content"]},
    ],
    "chosen": {"from": "gpt", "value": NO["content"]},
    "rejected": {"from": "gpt", "value": YES["content"]},
}

PKU = {
    "prompt": USER["content"],
    "response_0": "zero",
    "response_1": "one",
    "is_response_0_safe": True,
    "is_response_1_safe": True,
    "better_response_id": 0,
    "safer_response_id": 1,
}

HH = {
    "chosen": "\n\nHuman: Hello\n\nAssistant: Hello!\n\nHuman: Bake?\n\nAssistant: No.\n\nReally.",
    "rejected": "\n\nHuman: Hello\n\nAssistant: Hello!\n\nHuman: Bake?\n\nAssistant: Yes.",
}

TEXT = {"chosen": "The sky is blue at noon.", "rejected": "The sky is green."}

SOUND = {
    "preference": PREFERENCE,
    "preference_text": TEXT,
    "sharegpt": SHAREGPT,
    "pku_saferlhf": PKU,
    "hh_rlhf": HH,
    "openai": {
        "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [NO],
        "non_preferred_output": [YES],
    },
    "llama_factory_v1": {"chosen_messages": [USER, NO], "rejected_messages": [USER, YES]},
}


def read(name, row):
    return read_pair(FORMATS[name], row)


def outcome(name, row):
    """(prompt as role: content, chosen, rejected), or the reason why there is none."""
    try:
        pair = read(name, row)
    except (BadRow, Excluded) as error:
        return str(error)
    prompt = [(message["role"], message["content"]) for message in pair.prompt]
    return prompt, pair.chosen["content"], pair.rejected["content"]


class TestPreference:
    def test_texts_and_messages_mean_the_same(self):
        texts = read("preference", PREFERENCE)
        messages = read("preference", {"prompt": [USER], "chosen": [NO], "rejected": [YES]})
        assert texts == messages
        assert (texts.prompt, texts.chosen, texts.rejected) == (
            [USER],
            NO,
            YES,
        )

    def test_implicit_prompt_is_all_but_the_last_turn(self):
        explicit = {"prompt": [SYSTEM, USER], "chosen": [NO], "rejected": [YES]}
        assert read("preference", IMPLICIT) == read("preference", explicit)

    def test_optional_columns_are_carried(self):
        pair = read(
            "preference", {**PREFERENCE, "group": "unsafe", "chosen_safe": True, "rejected_safe": None}
        )
        assert (pair.group, pair.chosen_safe, pair.rejected_safe) == ("unsafe", True, None)
        assert read("preference", PREFERENCE).group is None

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"prompt": None}, "prompt: null"),
            ({"prompt": 7}, "prompt: wrong type"),
            ({"chosen": None}, "chosen: null"),
            ({"rejected": 3.5}, "rejected: wrong type"),
            ({"chosen": "lone \ud800 surrogate"}, "chosen: not UTF-8"),
            ({"chosen": [NO, YES]}, "chosen: not exactly one assistant message"),
            ({"chosen": []}, "chosen: not exactly one assistant message"),
            ({"chosen": [USER]}, "chosen: not exactly one assistant message"),
            ({"prompt": [{"role": "judge", "content": "x"}]}, "prompt: unknown role"),
            ({"prompt": [{"role": "user"}]}, "prompt: a turn without content"),
            ({"prompt": [{"role": "user", "content": None}]}, "prompt: null"),
            ({"prompt": ["How?"]}, "prompt: wrong type"),
            ({"group": "mixed"}, "group: neither safe, unsafe nor null"),
            ({"group": 1}, "group: neither safe, unsafe nor null"),
            ({"chosen_safe": "yes"}, "chosen_safe: neither true nor false"),
            ({"rejected_safe": 2}, "rejected_safe: neither true nor false"),
        ],
    )
    def test_bad_values(self, changes, reason):
        assert outcome("preference", {**PREFERENCE, **changes}) == reason

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"chosen": [USER, NO]}, "rejected: missing"),
            ({"chosen": "a text", "rejected": "another"}, "prompt: missing"),
            ({"chosen": [USER], "rejected": [USER, YES]}, "chosen: does not end with an assistant's turn"),
            ({"chosen": [USER, NO], "rejected": []}, "rejected: does not end with an assistant's turn"),
            (
                {"chosen": [USER, NO], "rejected": [SYSTEM, USER, YES]},
                "prompt: differs between chosen and rejected",
            ),
        ],
    )
    def test_bad_implicit_prompts(self, row, reason):
        assert outcome("preference", row) == reason


class TestPreferenceText:
    def test_the_prompt_is_what_both_begin_with_cut_between_words(self):
        assert outcome("preference_text", TEXT) == ([("user", "The sky is")], "blue at noon.", "green.")
        row = {"chosen": "We can not", "rejected": "We cannot"}
        assert outcome("preference_text", row) == ([("user", "We")], "can not", "cannot")

    @pytest.mark.parametrize("between", [" ", "\n", "\n\n", " \n"])
    def test_a_line_break_parts_words_as_a_space_does(self, between):
        row = {
            side: f"What is a cat?{between}{text}" for side, text in (("chosen", "Good"), ("rejected", "Bad"))
        }
        assert outcome("preference_text", row) == ([("user", "What is a cat?")], "Good", "Bad")

    @pytest.mark.parametrize(
        ("chosen", "rejected", "meant"),
        [
            ("a b", "a b c", ([("user", "a b")], "", "c")),
            ("a b", "a bc", ([("user", "a")], "b", "bc")),
            ("a  b", "a  c", ([("user", "a")], "b", "c")),
            ("a b", "a b", ([("user", "a b")], "", "")),
        ],
    )
    def test_ends(self, chosen, rejected, meant):
        assert outcome("preference_text", {"chosen": chosen, "rejected": rejected}) == meant

    def test_nothing_in_common(self):
        reason = "prompt: chosen and rejected have no first word in common"
        assert outcome("preference_text", {"chosen": "a text", "rejected": "another"}) == reason


class TestSharegpt:
    def test_turns_become_messages(self):
        prompt = [("user", "Hello"), ("assistant", "Hello!"), ("user", USER["content"])]
        assert outcome("sharegpt", SHAREGPT) == (prompt, NO["content"], YES["content"])

    def test_system_column_comes_first(self):
        prompt = read("sharegpt", {**SHAREGPT, "system": SYSTEM["content"]}).prompt
        assert prompt == [SYSTEM, *read("sharegpt", SHAREGPT).prompt]
        assert read("sharegpt", {**SHAREGPT, "system": ""}) == read("sharegpt", {**SHAREGPT, "system": None})

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"conversations": "Hello"}, "conversations: wrong type"),
            ({"conversations": [{"from": "judge", "value": "x"}]}, "conversations: unknown role"),
            ({"conversations": [{"value": "x"}]}, "conversations: a turn without from"),
            ({"chosen": 3}, "chosen: wrong type"),
            ({"chosen": {"from": "human", "value": "x"}}, "chosen: not exactly one turn of the assistant"),
            ({"rejected": {"from": "gpt", "value": 4}}, "rejected: wrong type"),
            ({"rejected": None}, "rejected: null"),
            ({"system": 5}, "system: wrong type"),
        ],
    )
    def test_bad_values(self, changes, reason):
        assert outcome("sharegpt", {**SHAREGPT, **changes}) == reason


class TestPku:
    @pytest.mark.parametrize("safe_0", [True, False])
    @pytest.mark.parametrize("safe_1", [True, False])
    @pytest.mark.parametrize("better", [0, 1])
    def test_labels_decide(self, safe_0, safe_1, better):
        row = {
            **PKU,
            "is_response_0_safe": safe_0,
            "is_response_1_safe": safe_1,
            "better_response_id": better,
        }
        if not safe_0 and not safe_1:
            with pytest.raises(Excluded, match="both responses unsafe"):
                read("pku_saferlhf", row)
            return
        pair = read("pku_saferlhf", row)
        both = safe_0 and safe_1
        chosen = ("zero", "one")[better] if both else ("zero" if safe_0 else "one")
        assert pair.chosen["content"] == chosen
        assert {pair.chosen["content"], pair.rejected["content"]} == {"zero", "one"}
        assert pair.group == ("safe" if both else "unsafe")
        assert (pair.chosen_safe, pair.rejected_safe) == (True, both)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"is_response_0_safe": 0.5}, "is_response_0_safe: neither true nor false"),
            ({"is_response_1_safe": None}, "is_response_1_safe: null"),
            ({"better_response_id": 2}, "better_response_id: neither 0 nor 1"),
            ({"better_response_id": True}, "better_response_id: wrong type"),
            ({"better_response_id": "0"}, "better_response_id: wrong type"),
            ({"response_1": 4}, "response_1: wrong type"),
            ({"is_response_0_safe": False, "better_response_id": 2}, "better_response_id: neither 0 nor 1"),
        ],
    )
    def test_bad_values(self, changes, reason):
        assert outcome("pku_saferlhf", {**PKU, **changes}) == reason


class TestHh:
    def test_transcript_becomes_turns(self):
        prompt = [("user", "Hello"), ("assistant", "Hello!"), ("user", "Bake?")]
        assert outcome("hh_rlhf", HH) == (prompt, "No.\n\nReally.", "Yes.")

    @pytest.mark.parametrize(
        ("rejected", "reason"),
        [
            (HH["rejected"].replace("Hello", "Hi", 1), "prompt: differs between chosen and rejected"),
            ("Yes.", "rejected: not a transcript of Human: and Assistant:"),
            ("So\n\nHuman: x\n\nAssistant: y", "rejected: not a transcript of Human: and Assistant:"),
            ("\n\nHuman: Hello", "rejected: does not end with an assistant's turn"),
            (["Yes."], "rejected: wrong type"),
        ],
    )
    def test_bad_values(self, rejected, reason):
        assert outcome("hh_rlhf", {**HH, "rejected": rejected}) == reason

    def test_a_name_inside_a_line_is_no_turn(self):
        said = "They wrote: Human: hi\n\nAnd left."
        chosen = HH["chosen"] + said
        assert read("hh_rlhf", {**HH, "chosen": chosen}).chosen["content"].endswith(said)

    def test_a_name_behind_one_line_break_is_no_turn_where_blank_lines_part_them(self):
        said = "I heard:\nHuman: hi\nAssistant: ho"
        chosen = HH["chosen"] + said
        assert read("hh_rlhf", {**HH, "chosen": chosen}).chosen["content"].endswith(said)


@pytest.mark.parametrize("name", SOUND)
def test_every_needed_column_is_missed_by_name(name):
    optional = {"safer_response_id"}
    for column in SOUND[name].keys() - optional:
        row = copy.deepcopy(SOUND[name])
        del row[column]
        expected = "prompt: missing" if (name, column) == ("preference", "prompt") else f"{column}: missing"
        assert outcome(name, row) == expected


class TestDetect:
    @pytest.mark.parametrize("name", SOUND)
    def test_each_format_is_told_from_the_others(self, name):
        assert detect([SOUND[name]], "pairs.jsonl").name == name

    def test_implicit_prompt(self):
        assert detect([IMPLICIT], "pairs.jsonl").name == "preference"

    @pytest.mark.parametrize("name", SOUND)
    def test_a_bad_row_among_sound_ones_does_not_confuse(self, name):
        for column in SOUND[name]:
            damaged = {key: value for key, value in SOUND[name].items() if key != column}
            assert (
                detect([damaged, {}, {**SOUND[name], column: None}, SOUND[name]], "pairs.jsonl").name == name
            )

    def test_of_the_columns_those_are_named_that_some_format_knows(self):
        """Without a header the first row would be taken for the columns' names."""
        with pytest.raises(UserError) as caught:
            detect([{"my question": "secret words", "secret words": 1, "chosen": 2}], "pairs.jsonl")
        message = str(caught.value)
        assert message.startswith("pairs.jsonl: columns chosen,2 unknown fit no known format")
        assert "conversations,chosen,rejected" in message
        assert "secret" not in message

    def test_two_formats_at_once_are_refused(self):
        with pytest.raises(UserError, match=r"pairs\.jsonl: .*preference and sharegpt; set data\.format"):
            detect([{**PREFERENCE, **SHAREGPT}], "pairs.jsonl")


def test_a_format_is_called_as_its_module():
    assert {name: form.name for name, form in FORMATS.items()} == {name: name for name in FORMATS}
