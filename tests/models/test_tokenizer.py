"""Chat template -> ids, against the ids of the whole conversation as the template itself renders it."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from transformers import LlamaConfig

from bdpo.config import ModelConfig
from bdpo.errors import UserError
from bdpo.models.tokenizer import (
    ChatTokenizer,
    faithful_chat,
    load_tokenizer,
    read_template,
    require_embedded,
    tokenizer_fingerprint,
)
from tests.support.chats import CHATML, MISTRAL, byte_tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|header|>\n\n{{ m.content }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|header|>\n\n{% endif %}"
)


VICUNA = (
    "{{ bos_token }}A chat. {% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

END_OF_TURN = {
    CHATML: "<|im_end|>",
    LLAMA3: "<|eot_id|>",
    MISTRAL: "</s>",
    VICUNA: "</s>",
}

# What follows the end of an assistant turn, and so is neither prompt nor response.
AFTER_TURN = {CHATML: "\n", LLAMA3: "", MISTRAL: "", VICUNA: ""}

CONVERSATION = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "What is a plinth?"},
]


def by_name(templates):
    names = {id(v): k for k, v in globals().items() if isinstance(v, str)}
    return pytest.mark.parametrize("template", list(templates), ids=lambda text: names[id(text)])


def token(chat, text):
    return chat.tokenizer.convert_tokens_to_ids(text)


def ids(chat, text):
    return chat.tokenizer(text, add_special_tokens=False)["input_ids"]


@by_name(AFTER_TURN)
def test_prompt_and_response_are_the_rendered_conversation(make_chat, template):
    chat = make_chat(template)
    answer = "A base: for a statue, 'né à Paris' 石"
    rendered = chat.tokenizer.apply_chat_template(
        [*CONVERSATION, {"role": "assistant", "content": answer}], tokenize=False
    )
    whole = ids(chat, rendered)
    after = ids(chat, AFTER_TURN[template])
    assert chat.prompt_ids(CONVERSATION) + chat.response_ids(answer) + after == whole


@by_name(END_OF_TURN)
def test_a_response_ends_with_the_end_of_turn(make_chat, template):
    chat = make_chat(template)
    end = token(chat, END_OF_TURN[template])
    assert chat.end_of_turn_id == end
    response = chat.response_ids("Yes")
    assert response[-1] == end
    assert chat.tokenizer.decode(response[:-1]).removeprefix(" ") == "Yes"


@by_name([LLAMA3, MISTRAL, VICUNA])
def test_bos_is_written_once(make_chat, template):
    chat = make_chat(template)
    assert chat.prompt_ids(CONVERSATION).count(token(chat, "<s>")) == 1
    assert token(chat, "<s>") not in chat.response_ids("Yes")


@pytest.mark.parametrize("text", ["e", "ello", " e"])
def test_no_merge_crosses_the_boundary(make_chat, text):
    """Tokenised as one text, `:` + `e` would be a single token and the answer would lose its own."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}:{% else %}{{ m.content }}</s>"
        "{% endif %}{% endfor %}"
    )
    chat = make_chat(template, merges=[(":", "e"), ("Ġ", "e")])
    prompt = [{"role": "user", "content": "x"}]
    assert ids(chat, ":e") == [token(chat, ":e")]
    assert chat.prompt_ids(prompt)[-1] == token(chat, ":")
    assert chat.response_ids(text)[:-1] == ids(chat, text)


def test_unconditional_contexts(make_chat):
    chat = make_chat(LLAMA3)
    text = "<s><|header|>user<|header|>\n\n<|eot_id|><|header|>assistant<|header|>\n\n"
    assert chat.unconditional_ids("empty_turn") == ids(chat, text)
    assert chat.unconditional_ids("bos") == [token(chat, "<s>")]
    chat.tokenizer.bos_token = None
    assert chat.unconditional_ids("bos") == [token(chat, "</s>")]
    chat.tokenizer.eos_token = None
    assert chat.tokenizer.eos_token_id is None
    with pytest.raises(UserError, match=r"score\.unconditional=bos: the tokenizer has neither"):
        chat.unconditional_ids("bos")


# As Llama 3.2 has it: the day's date, or this one where there is no clock.
LLAMA_DATE = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}'
    '{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}\nToday: {{ date_string }}\n'
)


def test_no_template_learns_what_day_it_is(make_chat):
    """Neither by itself nor in a macro of its own, nor to the microsecond."""
    clock = "{% macro now() %}{{ strftime_now('%Y-%m-%d %H:%M:%S') }}{% endmacro %}At {{ now() }}"
    frozen = make_chat(clock + LLAMA_DATE + CHATML)
    question = [{"role": "user", "content": "x"}]
    ours, theirs = (
        frozen.template.render(question),
        frozen.tokenizer.apply_chat_template(question, tokenize=False),
    )
    without_clock = make_chat(LLAMA_DATE.replace("strftime_now", "nothing") + CHATML).tokenizer
    fallback = without_clock.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert fallback.startswith("Today: 26 Jul 2024\n")
    assert ours == "At 2024-07-26 00:00:00" + fallback
    time.sleep(1.1)
    assert frozen.template.render(question) == ours
    assert frozen.tokenizer.apply_chat_template(question, tokenize=False) != theirs  # the real clock runs


@pytest.mark.parametrize(
    ("codes", "written"),
    [
        ("%F", "2024-07-26"),
        ("%-d %B %Y", "26 July 2024"),
        ("%A, %e %h", "Friday, 26 Jul"),
        ("%D %T|%Z%z", "07/26/24 00:00:00|"),
        ("%C %G-W%V %R %r", "20 2024-W30 00:00 12:00:00 AM"),
        ("%s.%f", "1721952000.000000"),
        ("%%d %%%d%%", "%d %26%"),
        ("%^a %-m/%-H", "FRI 7/0"),
        ("no code", "no code"),
    ],
)
def test_the_frozen_clock_knows_the_codes_of_strftime(make_chat, codes, written):
    chat = make_chat("{{ strftime_now('" + codes + "') }}|" + CHATML)
    assert chat.template.question.startswith(written + "|<|im_start|>")


@pytest.mark.parametrize("codes", ["%Ey", "%10d", "100 %", "%Q"])
def test_a_code_that_the_frozen_clock_does_not_know_is_no_text(make_chat, codes):
    chat = make_chat("{{ strftime_now('" + codes + "') }}" + CHATML)
    with pytest.raises(UserError, match=f"m: the chat template .*strftime_now: {codes} has an unknown code"):
        faithful_chat(chat.tokenizer, {}, "m")


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("\ufeff", "chat template: begins with a byte order mark"),
        ("\ufdd0\ufdd1", "chat template: writes the noncharacters"),
        ("{{ '\\ud800' }}", "the chat template cannot be rendered (UnicodeEncodeError"),
    ],
)
def test_a_template_that_writes_characters_of_no_text_is_refused(make_chat, before, reason):
    with pytest.raises(UserError, match=re.escape(f"m: {reason}")):
        faithful_chat(make_chat(before + CHATML).tokenizer, {}, "m")


@pytest.mark.parametrize("template", ["\n" + CHATML, "  {% set a = 1 %}\n" + CHATML, "x\n"])
def test_the_frozen_clock_changes_nothing_else_of_a_template(make_chat, template):
    chat = make_chat(template)
    assert chat.template.render(CONVERSATION, generate=False) == chat.tokenizer.apply_chat_template(
        CONVERSATION, tokenize=False
    )


def test_a_template_that_loses_the_answer_is_refused(make_chat):
    chat = make_chat("{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(UserError, match="does not contain its own text"):
        chat.response_ids("Yes")


@given(st.lists(st.text(max_size=30)), st.booleans())
def test_texts_encoded_together_are_those_encoded_alone(texts, truncates):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    chat = ChatTokenizer(tokenizer)
    texts = [chat.template.render([{"role": "user", "content": text}]) for text in (*texts, "a<|im_end|>b")]
    alone = [chat.text_ids(text) for text in texts]
    if truncates:
        chat.tokenizer.backend_tokenizer.enable_truncation(2)
        chat.tokenizer.backend_tokenizer.enable_padding()
    assert chat.ids_of_texts(texts) == alone
    assert chat.ids_of_answers(texts) == [chat.answer_ids(text) for text in texts] == alone


class TestLoadTokenizer:
    @pytest.fixture
    def folder(self, tmp_path):
        """A model's folder as far as its tokenizer is concerned; it has no chat template."""
        (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
        save_file({"weight": np.zeros(1)}, tmp_path / "model.safetensors")
        byte_tokenizer().save_pretrained(tmp_path)
        return tmp_path

    def test_saved_and_loaded(self, folder, tiny_chat):
        tiny_chat.tokenizer.save_pretrained(folder)
        loaded = load_tokenizer(ModelConfig(name_or_path=str(folder)))
        assert loaded.prompt_ids(CONVERSATION) == tiny_chat.prompt_ids(CONVERSATION)

    def test_without_template(self, folder):
        with pytest.raises(UserError, match=r"no chat template; set model\.chat_template to a Jinja file"):
            load_tokenizer(ModelConfig(name_or_path=str(folder)))

    def test_template_from_a_file(self, folder, make_chat):
        (folder / "own.jinja").write_text(VICUNA)
        config = ModelConfig(name_or_path=str(folder), chat_template=str(folder / "own.jinja"))
        assert load_tokenizer(config).prompt_ids(CONVERSATION) == make_chat(VICUNA).prompt_ids(CONVERSATION)

    def test_a_byte_order_mark_of_a_template_file_is_no_text(self, folder, make_chat):
        (folder / "own.jinja").write_text(VICUNA, encoding="utf-8-sig")
        config = ModelConfig(name_or_path=str(folder), chat_template=str(folder / "own.jinja"))
        assert load_tokenizer(config).prompt_ids(CONVERSATION) == make_chat(VICUNA).prompt_ids(CONVERSATION)

    @pytest.mark.parametrize("content", [None, b"\xff", b"{% for", b"{{ nothing }}"])
    def test_useless_template_file(self, folder, content):
        file = folder / "own.jinja"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UserError, match=r"own\.jinja: cannot be read|chat template") as caught:
            load_tokenizer(ModelConfig(name_or_path=str(folder), chat_template=str(file)))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("file", ["a\0b", "a\nb", "\x1b[2J", "x" * 5000])
    def test_a_template_file_that_can_be_none_is_one_line(self, file):
        with pytest.raises(UserError, match="cannot be read") as caught:
            read_template(file)
        assert str(caught.value).startswith("model.chat_template=")
        assert str(caught.value).isprintable()

    @pytest.mark.parametrize("content", [None, "{", "{}"])
    def test_useless_tokenizer_file(self, folder, content):
        for file in folder.glob("*token*"):
            file.unlink()
        if content is not None:
            (folder / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match="no tokenizer can be loaded") as caught:
            load_tokenizer(ModelConfig(name_or_path=str(folder)))
        assert "\n" not in str(caught.value)

    def test_more_tokens_than_embeddings(self, folder, tiny_chat):
        tiny_chat.tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 261}')
        with pytest.raises(UserError, match=r"has ids up to 261, the model has 261 embeddings"):
            load_tokenizer(ModelConfig(name_or_path=str(folder)))

    def test_a_padding_token_needs_no_embedding(self, folder, tiny_chat):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = CHATML
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 262}')
        load_tokenizer(ModelConfig(name_or_path=str(folder)))

    def test_variables_of_the_template_go_to_every_rendering_and_the_fingerprint(self, folder, make_chat):
        make_chat("{{ mood }}" + CHATML).tokenizer.save_pretrained(folder)
        plain, glad = (
            ModelConfig(name_or_path=str(folder), template_kwargs=variables)
            for variables in ({}, {"mood": "glad "})
        )
        chat = load_tokenizer(glad)
        assert chat.decode(chat.prompt_ids(CONVERSATION)).startswith("glad ")
        assert chat.decode(chat.unconditional_ids("empty_turn")).startswith("glad ")
        without, having = tokenizer_fingerprint(plain), tokenizer_fingerprint(glad)
        assert "template_kwargs" not in without
        assert having.keys() == without.keys() | {"template_kwargs"}

    @pytest.mark.parametrize(
        ("name", "hint"),
        [("modd", "did you mean mood?"), ("x", "it reads mood"), ("ood", "did you mean mood?")],
    )
    def test_a_variable_that_the_template_does_not_read_is_refused(self, folder, make_chat, name, hint):
        make_chat("{{ mood }}" + CHATML).tokenizer.save_pretrained(folder)
        reason = f"model.template_kwargs.{name}: the chat template does not read it; {hint}"
        with pytest.raises(UserError, match=re.escape(reason)) as caught:
            load_tokenizer(ModelConfig(name_or_path=str(folder), template_kwargs={name: 1}))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": {"b": float("-inf")}}, {1, 2}])
    def test_a_variable_that_is_not_finite_is_refused(self, value):
        with pytest.raises(ValueError, match="mood expects a value that JSON can hold, with finite numbers"):
            ModelConfig(name_or_path="m", template_kwargs={"mood": value})

    @pytest.mark.parametrize(
        "name", ["messages", "add_generation_prompt", "tools", "strftime_now", "bos_token"]
    )
    def test_a_variable_that_every_rendering_decides_is_refused(self, name):
        with pytest.raises(ValueError, match=f"{name} is no variable of a template"):
            ModelConfig(name_or_path="m", template_kwargs={name: 1})

    @pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages[7].content }}", "{{ 'a' + 1 }}"])
    def test_a_template_that_raises_anything_is_refused_in_one_line(self, folder, make_chat, template):
        make_chat(template).tokenizer.save_pretrained(folder)
        with pytest.raises(UserError, match="the chat template cannot be rendered") as caught:
            load_tokenizer(ModelConfig(name_or_path=str(folder)))
        assert "\n" not in str(caught.value)


def test_ids_beyond_the_embedding_are_refused():
    tokenizer = byte_tokenizer()
    last = max(tokenizer.get_vocab().values())
    require_embedded(tokenizer, LlamaConfig(vocab_size=last + 1), "m")
    with pytest.raises(UserError, match=f"^m: the tokenizer has ids up to {last}, the model has {last} "):
        require_embedded(tokenizer, LlamaConfig(vocab_size=last), "m")
