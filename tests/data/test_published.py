"""Published data sets as they are: rows of each schema, of our own words, through detection and reading."""

from __future__ import annotations

import gzip
import json
import lzma

import pyarrow as pa
import pytest

from bdpo.data.formats import FORMATS, detect, read_pair
from bdpo.data.formats.base import BadRow, Excluded
from tests.support.data_files import pair_row, refusal, write_csv, write_jsonl, write_parquet

ASK, GOOD, BAD = "How do I water a fern?", "A little, once a week.", "Never at all."


def user(text=ASK):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def parts(role, text, key="text"):
    return {"role": role, "content": [{"type": "text", key: text}]}


WHOLE = {"chosen": [user(), assistant(GOOD)], "rejected": [user(), assistant(BAD)]}

PKU = {"prompt": ASK, "response_0": BAD, "response_1": GOOD}

PUBLISHED = {
    "UltraFeedback binarized": (
        "preference",
        {
            "prompt": ASK,
            "prompt_id": "1",
            **WHOLE,
            "messages": WHOLE["chosen"],
            "score_chosen": 8.0,
            "score_rejected": 2.0,
        },
    ),
    "UltraFeedback cleaned by Argilla": (
        "preference",
        {"source": "fern", "prompt": ASK, **WHOLE, "chosen-rating": 5.0, "chosen-model": "m"},
    ),
    "Tulu 3 mixture": ("preference", {"id": "1", "prompt": ASK, **WHOLE, "source": "fern"}),
    "HH-RLHF": (
        "hh_rlhf",
        {
            "chosen": f"\n\nHuman: {ASK}\n\nAssistant: {GOOD}",
            "rejected": f"\n\nHuman: {ASK}\n\nAssistant: {BAD}",
        },
    ),
    "HH-RLHF, prompt apart": (
        "hh_rlhf",
        {"prompt": f"\n\nHuman: {ASK}\n\nAssistant:", "chosen": f" {GOOD}", "rejected": f" {BAD}"},
    ),
    "PKU-SafeRLHF": (
        "pku_saferlhf",
        {
            **PKU,
            "prompt_source": "s",
            "is_response_0_safe": False,
            "is_response_1_safe": True,
            "response_0_harm_category": {"Fire": True},
            "response_0_severity_level": 2,
            "better_response_id": 0,
            "safer_response_id": 1,
        },
    ),
    "PKU-SafeRLHF-30K": (
        "pku_saferlhf",
        {
            **PKU,
            "is_response_0_safe": True,
            "is_response_1_safe": True,
            "better_response_id": 1,
            "safer_response_id": 0,
        },
    ),
    "PKU-SafeRLHF-single-dimension": (
        "pku_saferlhf",
        {**PKU, "response_0_source": "m", "better_response_id": 1},
    ),
    "Nectar": (
        "ranked",
        {
            "prompt": f"\n\nHuman: {ASK}\n\nAssistant: ",
            "answers": [
                {"answer": "So and so.", "model": "a", "rank": 2.0},
                {"answer": BAD, "model": "b", "rank": 3.0},
                {"answer": GOOD, "model": "c", "rank": 1.0},
            ],
            "turns": 1,
            "num_responses": 3,
            "source": ["fern"],
            "good_natured": True,
        },
    ),
    "UltraFeedback": (
        "ranked",
        {
            "source": "fern",
            "instruction": ASK,
            "completions": [
                {"response": BAD, "overall_score": 2.0},
                {"response": GOOD, "overall_score": 8.5},
            ],
        },
    ),
    "distilabel, rated": (
        "ranked",
        {"instruction": ASK, "generations": [BAD, "Well.", GOOD], "ratings": [1, None, 5], "model_name": "m"},
    ),
    "OpenAI": (
        "openai",
        {
            "input": {"messages": [user()], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [assistant(GOOD)],
            "non_preferred_output": [assistant(BAD)],
        },
    ),
    "LLaMA-Factory, version 1": (
        "llama_factory_v1",
        {
            "chosen_messages": [
                parts("user", ASK, "value") | {"loss_weight": 0.0},
                parts("assistant", GOOD, "value") | {"loss_weight": 1.0},
            ],
            "rejected_messages": [parts("user", ASK, "value"), parts("assistant", BAD, "value")],
        },
    ),
    "LLaMA-Factory, ShareGPT": (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": ASK}],
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
    ),
    "LLaMA-Factory, ShareGPT with roles": (
        "sharegpt",
        {"conversations": [user()], "chosen": assistant(GOOD), "rejected": assistant(BAD)},
    ),
    "LLaMA-Factory, Alpaca": (
        "instruction",
        {"instruction": "How do I water", "input": "a fern?", "chosen": GOOD, "rejected": BAD},
    ),
    "Argilla": (
        "instruction",
        {
            "source": "s",
            "instruction": ASK,
            "chosen_response": GOOD,
            "rejected_response": BAD,
            "chosen_model": "m",
        },
    ),
    "distilabel": (
        "preference",
        {
            "instruction": ASK,
            "generations": [GOOD, BAD],
            "ratings": [5, 1],
            "prompt": ASK,
            **WHOLE,
            "chosen_rating": 5,
        },
    ),
    "orca pairs": ("instruction", {"system": "", "question": ASK, "chosen": GOOD, "rejected": BAD}),
    "orca pairs by distilabel": (
        "instruction",
        {
            "system": "",
            "input": ASK,
            "chosen": GOOD,
            "rejected": BAD,
            "generations": [GOOD, BAD],
            "rating": [9, 1],
        },
    ),
    "HelpSteer 2": (
        "helpsteer",
        {"prompt": ASK, "response_1": BAD, "response_2": GOOD, "preference_strength": 2, "split": "train"},
    ),
    "HelpSteer 3": (
        "helpsteer",
        {"domain": "s", "context": [user()], "response1": GOOD, "response2": BAD, "overall_preference": -3},
    ),
    "content parts": (
        "preference",
        {
            "prompt": [parts("user", ASK)],
            "chosen": [parts("assistant", GOOD)],
            "rejected": [parts("assistant", BAD)],
        },
    ),
}


def texts(pair):
    return [(m["role"], m["content"]) for m in pair.prompt], pair.chosen["content"], pair.rejected["content"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_row_is_recognised_and_read(name):
    form, row = PUBLISHED[name]
    assert detect([row], "rows").name == form
    prompt, chosen, rejected = texts(read_pair(FORMATS[form], row))
    assert ([(role, text.replace("\n", " ")) for role, text in prompt], chosen, rejected) == (
        [("user", ASK)],
        GOOD,
        BAD,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_row_survives_parquet(tmp_path, prepare_here, kept_pairs, name):
    """Columnar files give nested objects the keys of all their neighbours."""
    form, row = PUBLISHED[name]
    account = prepare_here(write_parquet(tmp_path / "rows.parquet", [row]))
    assert (account.kept, account.sources[0].format) == (1, form)
    assert (kept_pairs()[0]["chosen"], kept_pairs()[0]["rejected"]) == (GOOD, BAD)


@pytest.mark.parametrize(
    ("form", "row", "reason"),
    [
        ("ranked", {"prompt": ASK, "answers": [{"answer": GOOD, "rank": 1}]}, "no answer is rated better"),
        (
            "ranked",
            {"prompt": ASK, "generations": [GOOD, BAD], "ratings": [3, 3]},
            "no answer is rated better",
        ),
        ("ranked", {"prompt": ASK, "generations": [GOOD, BAD], "ratings": [3]}, "ratings: not as many"),
        ("ranked", {"prompt": ASK, "answers": [{"answer": GOOD, "rank": "1"}]}, "answers.rank: not a number"),
        ("ranked", {"prompt": ASK, "answers": ["x", "y"]}, "answers: wrong type"),
        (
            "helpsteer",
            PUBLISHED["HelpSteer 2"][1] | {"preference_strength": 0},
            "neither response is preferred",
        ),
        (
            "helpsteer",
            PUBLISHED["HelpSteer 2"][1] | {"preference_strength": None},
            "preference_strength: null",
        ),
        ("openai", PUBLISHED["OpenAI"][1] | {"input": "x"}, "input: not an object"),
        (
            "openai",
            PUBLISHED["OpenAI"][1] | {"input": {"messages": [user()], "images": ["a.png"]}},
            "input.images: not empty, and only text is read",
        ),
        (
            "openai",
            PUBLISHED["OpenAI"][1] | {"input": {"messages": [user()], "tools": {"name": "f"}}},
            "input.tools: wrong type",
        ),
        (
            "ranked",
            {
                "prompt": ASK,
                "answers": [{"answer": GOOD, "rank": 1}, {"answer": BAD, "rank": 2, "images": ["a"]}],
            },
            "answers.images: not empty, and only text is read",
        ),
        (
            "preference",
            {"prompt": "You are a pirate.", **WHOLE},
            "prompt: a text that is no turn of the conversations",
        ),
        ("openai", PUBLISHED["OpenAI"][1] | {"preferred_output": []}, "preferred_output: not exactly one"),
        (
            "instruction",
            {"instruction": ASK, "chosen": GOOD, "rejected": BAD, "history": [["a"]]},
            "history: not",
        ),
        ("instruction", {"chosen": GOOD, "rejected": BAD}, "instruction: missing"),
        (
            "llama_factory_v1",
            {"chosen_messages": [user()], "rejected_messages": [user()]},
            "does not end with",
        ),
        (
            "hh_rlhf",
            {"prompt": "\n\nHuman: a\n\nAssistant: b", "chosen": "x", "rejected": "y"},
            "ends with an",
        ),
        ("chatml", {"prompt": ASK, "chosen": GOOD, "rejected": BAD}, "prompt: not a conversation in ChatML"),
        (
            "stringified",
            {"prompt": "[{'role': ", "chosen": GOOD, "rejected": BAD},
            "prompt: neither JSON nor",
        ),
    ],
)
def test_bad_rows_have_reasons(form, row, reason):
    with pytest.raises((BadRow, Excluded), match=reason):
        read_pair(FORMATS[form], row)


def test_history_comes_before_the_instruction():
    row = {"instruction": ASK, "chosen": GOOD, "rejected": BAD, "history": [["Hi", "Hello."]], "system": "S"}
    prompt, _, _ = texts(read_pair(FORMATS["instruction"], row))
    assert prompt == [("system", "S"), ("user", "Hi"), ("assistant", "Hello."), ("user", ASK)]


def test_rated_answers_to_an_instruction_with_an_input():
    row = {"instruction": "Translate:", "input": ASK, "history": [["a", "b"]]}
    row |= {"generations": [BAD, GOOD], "ratings": [1, 2]}
    pair = read_pair(detect([row], "rows"), row)
    assert pair.prompt == [user("a"), assistant("b"), user(f"Translate:\n{ASK}")]
    assert (pair.chosen, pair.unread) == (assistant(GOOD), frozenset())


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("preference", {"prompt": None, **WHOLE}),
        (
            "instruction",
            {
                "question": ASK,
                "chosen": None,
                "rejected": None,
                "chosen_response": GOOD,
                "rejected_response": BAD,
            },
        ),
    ],
)
def test_a_null_column_hides_no_other(form, row):
    assert texts(read_pair(FORMATS[form], row)) == ([("user", ASK)], GOOD, BAD)


def test_a_blank_instruction_is_none():
    row = {"instruction": "  ", "input": ASK, "chosen": GOOD, "rejected": BAD}
    assert read_pair(FORMATS["instruction"], row).prompt == [user()]


@pytest.mark.parametrize("separator", ["\n\n", "\n"])
def test_transcripts_with_a_system_turn_and_other_separators(separator):
    begin = f"System: Be brief.{separator}Human: Hi{separator}Assistant: Yes?{separator}Human: {ASK}"
    row = {
        side: f"{begin}{separator}Assistant: {text}" for side, text in (("chosen", GOOD), ("rejected", BAD))
    }
    assert detect([row], "rows").name == "hh_rlhf"
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", ASK)]
    assert texts(read_pair(FORMATS["hh_rlhf"], row)) == (turns, GOOD, BAD)


CHATML_ROW = {
    "prompt": "<|im_start|>system\nBe brief.<|im_end|>\n"
    f"<|im_start|>user\n{ASK}<|im_end|>\n<|im_start|>assistant\n",
    "chosen": f"{GOOD}<|im_end|>\n",
    "rejected": f"{BAD}<|im_end|>\n",
}

STRINGIFIED = {"prompt": json.dumps([user()]), "chosen": str([assistant(GOOD)]), "rejected": f"{BAD}"}

TRANSCRIPT = {"prompt": f"Human: {ASK}\n\nAssistant:", "chosen": GOOD, "rejected": BAD}


@pytest.mark.parametrize(
    ("row", "named"), [(CHATML_ROW, "chatml"), (STRINGIFIED, "stringified"), (TRANSCRIPT, "hh_rlhf")]
)
def test_text_that_is_rendered_already_names_the_format_that_reads_it(prepare_here, kept_pairs, row, named):
    reason = refusal(prepare_here, [row], format="preference", max_bad_fraction=0.1)
    assert f"set data.format={named}" in reason
    assert prepare_here([row], format=named).kept == 1
    assert (kept_pairs()[0]["prompt"][-1]["content"], kept_pairs()[0]["chosen"]) == (ASK, GOOD)


@pytest.mark.parametrize(
    "text", ["[INST] x [/INST]", "<|start_header_id|>user", "<start_of_turn>user", "<<SYS>>"]
)
def test_control_tokens_of_any_template_are_recognised(prepare_here, text):
    account = prepare_here([pair_row(0), pair_row(1, prompt=text), pair_row(2, chosen=f"x {text}")])
    reasons = {
        f"{side}: already templated: holds control tokens of a chat template; give the messages themselves"
        for side in ("prompt", "chosen")
    }
    assert set(account.quarantined) == reasons


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": f"USER: {ASK} ASSISTANT:"}, "prompt: ends where an answer begins"),
        ({"prompt": f"### Instruction:\n{ASK}\n\n### Response:\n"}, "prompt: ends where an answer begins"),
        ({"chosen": f"{GOOD}</s>\n"}, "chosen: ends with </s>"),
        ({"rejected": f"{BAD}</s>"}, "rejected: ends with </s>"),
        ({"rejected": "It is <s>not</s>"}, None),
        ({"prompt": "What is </s>"}, None),
    ],
)
def test_text_that_was_rendered_in_words_alone_is_recognised(prepare_here, row, reason):
    account = prepare_here([pair_row(0), pair_row(1) | row])
    assert (
        [name.startswith(reason) for name in account.quarantined] == [True] if reason else account.kept == 2
    )


def test_two_texts_of_a_rendered_conversation_are_recognised(prepare_here):
    row = {side: f"USER: {ASK} ASSISTANT: {text}" for side, text in (("chosen", GOOD), ("rejected", BAD))}
    assert "prompt: ends where an answer begins" in refusal(prepare_here, [row])


COMPRESSORS = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_compressed_files(tmp_path, prepare_here, kept_pairs, suffix, kind):
    rows = [pair_row(i) for i in range(300)]
    plain = tmp_path / f"plain{kind}"
    {".jsonl": write_jsonl, ".csv": write_csv}.get(kind, lambda p, r: p.write_text(json.dumps(r)))(
        plain, rows
    )
    file = tmp_path / f"rows{kind}{suffix}"
    data = plain.read_bytes()
    file.write_bytes(COMPRESSORS[suffix](data))
    assert prepare_here(file).kept == 300
    assert [pair["chosen"] for pair in kept_pairs()] == [row["chosen"] for row in rows]


def test_a_folder_as_hh_rlhf_is_published(tmp_path, prepare_here, monkeypatch):
    """Folders of train.jsonl.gz and test.jsonl.gz, read as one data set."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"):
        folder = tmp_path / "hh" / name
        folder.mkdir(parents=True)
        for split in ("train", "test"):
            row = {
                side: f"\n\nHuman: {name} {split}?\n\nAssistant: {side}" for side in ("chosen", "rejected")
            }
            (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    account = prepare_here(tmp_path / "hh")
    assert (account.kept, account.sources[0].format) == (4, "hh_rlhf")
    assert prepare_here(tmp_path / "hh", split="test").kept == 4
