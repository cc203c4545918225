"""Texts that are conversations already are read right or refused with a reason, and plain texts are kept."""

from __future__ import annotations

import json
import sys
import unicodedata

import pytest

from bdpo.data.checks import _VISIBLE, check_pair
from bdpo.data.formats import FORMATS, detect, read_pair
from bdpo.data.formats.base import BadRow

ASK, GOOD, BAD = "How do I water a fern?", "A little, once a week.", "Never at all."

SIDES = (("chosen", GOOD), ("rejected", BAD))

BEGIN = f"\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: {ASK}\n\nAssistant:"

WHOLE = {side: f"\n\nHuman: {ASK}\n\nAssistant: {text}" for side, text in SIDES}

RENDERED = {
    "Granite": f"<|start_of_role|>user<|end_of_role|>{ASK}<|end_of_text|>",
    "OpenChat": f"GPT4 Correct User: {ASK}<|end_of_turn|>GPT4 Correct Assistant: {GOOD}",
    "OpenChat without tokens": f"GPT4 Correct User: {ASK} GPT4 Correct Assistant:",
    "User and Assistant": f"User: {ASK}\n\nAssistant: {GOOD}",
    "after a system turn": f"System: Be brief.\n\nUser: {ASK}\n\nAssistant: {GOOD}",
    "capitals": f"HUMAN: {ASK}\nASSISTANT: {GOOD}",
    "Vicuna": f"USER: {ASK} ASSISTANT: {GOOD}",
    "User and Bot": f"User: {ASK}\nBot: {GOOD}",
    "User and AI": f"User: {ASK}\nAI: {GOOD}",
    "You and Bot": f"You: {ASK}\nBot: {GOOD}\nYou: And then?",
    "Human and AI": f"Human: {ASK}\nAI: {GOOD}",
    "small letters": f"human: {ASK}\nassistant: {GOOD}",
    "small letters of User": f"user: {ASK}\n\nassistant: {GOOD}",
    "a blank before the colon": f"Human : {ASK}\nAssistant : {GOOD}",
    "headings": f"### Human: {ASK}\n### Assistant: {GOOD}",
    "headings after a system turn": f"### System: Be brief.\n\n### Human: {ASK}\n\n### Assistant: {GOOD}",
    "bold names": f"**Human:** {ASK}\n\n**Assistant:** {GOOD}",
    "bold names without the colon": f"**User**: {ASK}\n\n**Assistant**: {GOOD}",
    "names in brackets": f"<human>: {ASK}\n<bot>: {GOOD}",
    "ChatML without its tokens": f"system\nBe brief.\nuser\n{ASK}\nassistant\n{GOOD}",
    "Alpaca": f"Below is an instruction.\n\n### Instruction:\n{ASK}\n\n### Response:\n{GOOD}",
    "Human and Assistant": f"\n\nHuman: {ASK}\n\nAssistant: {GOOD}",
    "sentences between tokens": f"{ASK}</s><s>{GOOD}",
    "a list behind a line break": f'\n [\n {{\n "role": "user", "content": "{ASK}"}}]',
    "ShareGPT's names": str([{"from": "human", "value": ASK}]),
    "an array of NumPy": f"array([{{'role': 'user', 'content': '{ASK}'}}], dtype=object)",
    "a member": json.dumps({"messages": [{"role": "user", "content": ASK}]}),
    "another key first": json.dumps([{"id": 1, "role": "user", "content": ASK}]),
    "a tuple": str(({"role": "user", "content": ASK},)),
    "JSON in JSON": json.dumps(json.dumps([{"role": "user", "content": ASK}])),
    "one message of ShareGPT": json.dumps({"from": "gpt", "value": GOOD}),
    "one message": json.dumps({"role": "assistant", "content": GOOD}),
    "one message of Python": "\n " + str({"content": GOOD, "role": "assistant"}),
}

# Of each family, what its template writes.
RENDERED |= {
    name: text.replace("Q", ASK)
    for name, text in {
        "OpenAssistant": "<|prompter|>Q<|endoftext|><|assistant|>",
        "Phi-3": "<|user|>\nQ</s>\n<|assistant|>\n",
        "the begin of a sentence": "<s>Q",
        "Metharme": "<|user|>Q<|model|>",
        "human and bot": "<|human|>Q<|bot|>",
        "GLM": "[gMASK]<sop>Q",
        "Gemma": "<start_of_turn>user\nQ<end_of_turn>\n",
        "Gemma's begin": "<bos>Q",
        "Gemma 4": "<|turn>user\nQ<turn|>",
        "Gemma 4's channel": "<|channel>thought\n<channel|>Q",
        "Command-R": "<BOS_TOKEN>Q",
        "DeepSeek": "<｜begin▁of▁sentence｜>Q",
        "Hunyuan": "<｜hy_User｜>Q<｜hy_Assistant｜>",
        "Mistral's system turn": "[SYSTEM_PROMPT]x[/SYSTEM_PROMPT]Q",
        "Mistral's tools": "[AVAILABLE_TOOLS]x[/AVAILABLE_TOOLS]Q",
        "MiniMax": "<beginning_of_sentence>user Q<end_of_sentence>",
        "LFM2": "<|startoftext|>Q",
        "Kimi": "<|im_user|>user<|im_middle|>Q<|im_end|>",
        "EXAONE": "[|user|]Q\n[|assistant|]",
        "Solar": "<|beginoftext|>Q",
        "Seed": "<seed:bos>user\nQ<seed:eos>",
    }.items()
}

RENDERED_ANSWERS = {
    "the name of a speaker": f"Assistant: {GOOD}",
    "the name in capitals": f" ASSISTANT: {GOOD}",
    "OpenChat's name": f"GPT4 Correct Assistant: {GOOD}",
    "a bold name": f"**Assistant:** {GOOD}",
    "a name in small letters": f"assistant: {GOOD}",
    "the name AI": f"AI: {GOOD}",
    "the name Bot": f"\nBot: {GOOD}",
    "Alpaca's heading": f"### Response:\n{GOOD}",
    "a heading": f"### Assistant: {GOOD}",
    "another turn of User": f"{GOOD}\n\nUser: And then?",
    "another turn in small letters": f"{GOOD}\n\nuser: And then?\n\nassistant: Wait.",
    "another turn in bold": f"{GOOD}\n\n**User:** And then?",
    "another heading": f"{GOOD}\n### Human: And then?",
    "another instruction": f"{GOOD}\n\n### Instruction:\nAnd then?",
    "the end of a sentence": f"{GOOD}<eos>",
    "another turn": f"{GOOD}\n\nHuman: And then?\n\nAssistant: Wait.",
    "the beginning of another turn": f"{GOOD}\n\nHuman:",
    "a turn of the user": f"{GOOD}\n\nHuman: And then?",
    "a turn of the user and more": f"{GOOD}\n\nHuman: And then?\n\nI wait.",
}

RENDERED_QUESTIONS = {
    "a name behind it": f"{ASK}\n\nAssistant:",
    "a name and a blank": f"{ASK}\nAssistant: ",
    "a name behind a blank": f"{ASK}\n AI:\n",
    "another name": f"{ASK}\nBot:",
    "a name in brackets": f"{ASK}\n<bot>:",
    "a bold name": f"{ASK}\n\n**Assistant:**",
    "capitals": f"{ASK} ASSISTANT:",
    "Alpaca's heading behind it": f"{ASK}\n\n### Response:\n",
    "a name before it": f"Assistant: {ASK}",
    "Alpaca's heading before it": f"### Response: {ASK}",
}

PLAIN = (
    "Which of these is the Assistant: Ms. Fern or the AI:",
    "Write to the assistant:\nAI: a field\nBot: a program",
    "Here is a talk:\nHuman: hi\nAssistant: ho",
    "Human: is that a word?",
    "The human asked.\nHuman: hi\nAssistant: ho",
    "Minutes.\n\nAssistant: Ms. Fern\n\nHuman resources: none",
    "User: root. Assistant: none",
    "Use <s>water</s> <s>milk</s>, and <eos> ends a sentence.",
    "Assistant managers water ferns.",
    "Bot programs: a list",
    "AI is: a field",
    "Assistants: Ms. Fern",
    "**Response:** none",
    "You: a noun",
    "User: root\nModel: X200",
    "Human:\nthe AI: a film",
    "A script:\n\nUser: hi\n\nBot: ho\n\nUser: bye",
    "# User: a heading",
    "### Instruction: a heading",
    "Question: What?\nAnswer:",
    "user\ninterface",
    "The user\nassistant\n",
    "#",
    '{"role": "admin", "content": "all"}',
    '{"role": "user", "rights": []}',
    "[1, 2]",
    '[{"from": "Ulm", "value": 3}]',
    '{"model": "m", "messages": [{"role": "user", "content": "hi"}]}',
    'The body is {"messages": [{"role": "user", "content": "hi"}]}',
    "(a) {b}",
    "</s> is a tag",
    "<s>old</s> new <b>and</b> bold",
    "F# has [| 1; 2 |] and [|x|], Haskell <|> and a <|x|> b",
    "<think>A fern.</think> Water it. <|begin_of_thought|>So<|end_of_thought|>",
    "<｜begin▁of▁thinking｜> and <|START_THINKING|>",
)


def outcome(row, form):
    """What a row is refused for, or the turns and answers that it becomes."""
    try:
        pair = read_pair(FORMATS[form], row)
        check_pair(pair)
    except BadRow as error:
        return str(error)
    turns = [message["content"] for message in pair.prompt]
    return turns, pair.chosen["content"], pair.rejected["content"]


@pytest.mark.parametrize("prompt", [f"\n\nHuman: {ASK}\n\nAssistant:", f"Human: {ASK}\nAssistant:", ASK])
def test_a_prompt_beside_whole_transcripts_repeats_their_begin(prompt):
    assert outcome({"prompt": prompt, **WHOLE}, "hh_rlhf") == ([ASK], GOOD, BAD)


def test_a_prompt_of_several_turns_beside_whole_transcripts():
    row = {"prompt": BEGIN, **{side: f"{BEGIN} {text}" for side, text in SIDES}}
    assert detect([row], "rows").name == "hh_rlhf"
    assert outcome(row, "hh_rlhf") == (["Hi", "Yes?", ASK], GOOD, BAD)


@pytest.mark.parametrize("prompt", [BEGIN, "\n\nHuman: Other\n\nAssistant:", "Other"])
def test_whole_transcripts_of_another_prompt_are_refused(prompt):
    row = {"prompt": prompt, **WHOLE}
    assert outcome(row, "hh_rlhf") == "prompt: differs from what chosen and rejected begin with"


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_whole_transcript_on_one_side_is_refused(side):
    row = {"prompt": f"\n\nHuman: {ASK}\n\nAssistant:", **dict(SIDES), side: WHOLE[side]}
    assert outcome(row, "hh_rlhf").startswith(f"{side}: holds turns of Human: and Assistant:")


@pytest.mark.parametrize(
    "text",
    [
        "Human: a\nmore\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "Human: a\nAssistant: b\nHuman: c\n\nAssistant: d",
        "Human: a\n\nAssistant: b\nHuman: c\n\nAssistant: d",
        "Human: a\n\nAssistant: b\nHuman: c\nAssistant: d",
        "Human: a\n\nAssistant: b\nHuman: c\nAssistant: d\n\nHuman: e\n\nAssistant: f",
    ],
)
def test_turns_that_are_parted_in_two_ways_are_refused(text):
    row = {"chosen": text, "rejected": f"{text} e"}
    reason = "chosen: some turns are parted by a blank line, others by a line break alone"
    assert outcome(row, "hh_rlhf") == reason


def test_a_transcript_may_end_with_an_answer_that_quotes_another():
    quote = "A short one:\nHuman: hi\nAssistant: ho"
    row = {
        side: f"Human: {ASK}\n\nAssistant: {text}" for side, text in (("chosen", quote), ("rejected", BAD))
    }
    assert outcome(row, "hh_rlhf") == ([ASK], quote, BAD)


def test_transcripts_beside_a_plain_prompt_name_the_format_that_reads_them():
    assert outcome({"prompt": ASK, **WHOLE}, "preference") == (
        "chosen: holds turns of Human: and Assistant:; give the answer alone, "
        "or two whole transcripts with data.format=hh_rlhf"
    )


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("name", RENDERED)
def test_a_rendered_text_is_refused_by_its_column(name, column):
    row = {"prompt": ASK, **dict(SIDES), column: RENDERED[name]}
    reason = outcome(row, "preference")
    assert isinstance(reason, str)
    assert reason.startswith(f"{column}: ")


@pytest.mark.parametrize("column", ["chosen", "rejected"])
@pytest.mark.parametrize("name", RENDERED_ANSWERS)
def test_a_rendered_answer_is_refused_by_its_column(name, column):
    reason = outcome({"prompt": ASK, **dict(SIDES), column: RENDERED_ANSWERS[name]}, "preference")
    assert isinstance(reason, str)
    assert reason.startswith(f"{column}: ")


@pytest.mark.parametrize("name", [*RENDERED, *RENDERED_QUESTIONS])
@pytest.mark.parametrize("place", [0, 2])
def test_every_rendered_turn_of_the_user_is_refused(name, place):
    contents = ["Hi", "Yes?", ASK]
    contents[place] = (RENDERED | RENDERED_QUESTIONS)[name]
    reason = outcome(conversation(*contents), "preference")
    assert isinstance(reason, str)
    assert reason.startswith("prompt: ")


@pytest.mark.parametrize("name", [*RENDERED, *RENDERED_ANSWERS])
def test_a_rendered_answer_in_the_history_is_refused(name):
    reason = outcome(conversation("Hi", (RENDERED | RENDERED_ANSWERS)[name], ASK), "preference")
    assert isinstance(reason, str)
    assert reason.startswith("prompt: ")


def test_a_first_turn_alone_names_the_format_that_reads_it():
    row = {"prompt": f"\n\nHuman: {ASK}", **dict(SIDES)}
    reason = "prompt: a transcript of Human: and Assistant:; set data.format=hh_rlhf"
    assert outcome(row, "preference") == reason
    assert outcome(row, "hh_rlhf") == ([ASK], GOOD, BAD)
    row["prompt"] = f"### Human: {ASK}"
    assert outcome(row, "preference").startswith("prompt: a transcript of two speakers")


@pytest.mark.parametrize("begin", ["", "The "])
def test_whole_texts_of_alpaca_are_no_prompt_and_answers(begin):
    row = {side: f"### Instruction:\n{ASK}\n\n### Response:\n{begin}{text}" for side, text in SIDES}
    assert outcome(row, "preference_text").startswith("prompt: ")


@pytest.mark.parametrize("text", PLAIN)
def test_a_plain_text_is_kept(text):
    for column in ("prompt", "chosen", "rejected"):
        row = {"prompt": ASK, **dict(SIDES), column: text}
        assert outcome(row, "preference") == ([row["prompt"]], row["chosen"], row["rejected"])
    assert outcome(conversation(text, text, ASK), "preference") == ([text, text, ASK], GOOD, BAD)


@pytest.mark.parametrize("written", [json.dumps, str])
def test_one_stringified_message_is_read(written):
    row = {
        "prompt": f"\n {written({'role': 'user', 'content': ASK})}",
        **{side: f"\n {written({'content': text, 'role': 'assistant'})}" for side, text in SIDES},
    }
    assert outcome(row, "preference").endswith("set data.format=stringified")
    assert outcome(row, "stringified") == ([ASK], GOOD, BAD)


NOTHING = {
    "a zero-width space": "\u200b",
    "a mark of order": "\ufeff\n",
    "fillers": "\u3164 \u2800",
    "tags": "\U000e0061",
}


def conversation(*contents, **changes):
    """A row whose prompt is the turns; the last one has `changes`."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"prompt": [*turns[:-1], turns[-1] | changes], **dict(SIDES)}


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("name", NOTHING)
def test_a_text_that_nobody_can_see_is_refused_by_its_column(name, column):
    reasons = {"prompt": "no user turn with text"} | dict.fromkeys(dict(SIDES), "invisible characters alone")
    row = {"prompt": ASK, **dict(SIDES), column: NOTHING[name]}
    assert outcome(row, "preference") == f"{column}: {reasons[column]}"


def test_what_nobody_can_see_is_what_unicode_says_of_it():
    """All spaces and controls, and no letter, digit or sign that has a shape."""
    characters = [chr(code) for code in range(sys.maxunicode + 1)]
    invisible = {c for c in characters if not _VISIBLE.search(c)}
    assert {c for c in characters if unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cc")} <= invisible
    drawn_as_nothing = set("\u115f\u1160\u2800\u3164\uffa0")
    assert {c for c in invisible if unicodedata.category(c)[0] in "LNPS"} == drawn_as_nothing


@pytest.mark.parametrize(
    "text", ["\u200bhi", "\u2764\ufe0f", "\U0001f44d", ".", "\u0600", "\u0915\u094d\u200d"]
)
def test_a_text_with_something_to_see_is_kept(text):
    row = {"prompt": text, "chosen": text, "rejected": BAD}
    assert outcome(row, "preference") == ([text], text, BAD)


@pytest.mark.parametrize(("place", "speaker"), [(0, "user"), (1, "assistant"), (2, "user")])
def test_a_turn_without_text_is_a_reason(place, speaker):
    contents = ["Hi", "Yes?", ASK]
    contents[place] = " \u200b"
    assert outcome(conversation(*contents), "preference") == f"prompt: a turn of the {speaker} without text"


def test_system_and_tool_turns_may_be_empty():
    """Many published sets have a system turn without text in every row; a tool may find nothing."""
    row = conversation(ASK)
    row["prompt"] = [
        {"role": "system", "content": ""},
        *row["prompt"],
        {"role": "assistant", "content": "", "tool_calls": [1]},
        {"role": "tool", "content": ""},
    ]
    assert outcome(row, "preference") == (["", ASK, "", ""], GOOD, BAD)


def test_a_key_that_is_empty_makes_no_answer():
    row = conversation(ASK) | {"chosen": [{"role": "assistant", "content": "", "score": 1}]}
    assert outcome(row, "preference") == "chosen: empty"


REPEATED = (
    "chosen and rejected: begin with the prompt; give the answers alone, or set data.format=preference_text"
)


@pytest.mark.parametrize("prompt", [ASK, [{"role": "user", "content": f" {ASK}\n"}]])
def test_answers_that_both_begin_with_the_prompt_are_whole_texts(prompt):
    row = {"prompt": prompt, **{side: f"{ASK} {text}" for side, text in SIDES}}
    assert outcome(row, "preference") == REPEATED
    assert outcome(row, "preference_text") == ([ASK], GOOD, BAD)


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [(ASK, f"{ASK} {GOOD}", BAD), (ASK, GOOD, ASK), ("Hello!", "Hello! You?", "Hello! Go.")],
)
def test_a_parrot_and_a_greeting_are_kept(prompt, chosen, rejected):
    """Published sets have answers that repeat the question, as the better or the worse one."""
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert outcome(row, "preference") == ([prompt], chosen, rejected)
