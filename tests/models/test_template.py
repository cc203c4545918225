"""What is encoded is what the template writes: families by hand, TRL's own rendering, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import trl
from jinja2 import TemplateError
from trl.data_utils import apply_chat_template

from bdpo.errors import UserError
from bdpo.models.template import ChatTemplate
from bdpo.models.tokenizer import ChatTokenizer, require_faithful_template
from tests.support.template_shapes import ANSWER, CONVERSATION, IM, REFUSED, SHAPES, chatml
from tests.support.tokenizers import byte_level, sentence_piece

ASSISTANT = {"role": "assistant", "content": ANSWER}

every_shape = pytest.mark.parametrize("name", SHAPES)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@every_shape
def test_prompt_and_response_are_the_rendering_written_by_hand(name):
    shape, chat = SHAPES[name], SHAPES[name].chat()
    prompt, response = chat.prompt_ids(shape.messages), chat.response_ids(ANSWER)
    assert chat.template.render(shape.messages) == shape.prompt
    assert prompt + response == ids(chat.tokenizer, shape.prompt + shape.response)
    assert chat.end_of_turn_id == response[-1] == chat.tokenizer.convert_tokens_to_ids(shape.end)
    require_faithful_template(chat)
    assert chat.is_faithful(shape.messages, ANSWER)


@every_shape
def test_the_response_has_the_same_ids_in_every_context(name):
    chat = SHAPES[name].chat()
    empty = chat.unconditional_ids("empty_turn")
    whole = chat.template.render([{"role": "user", "content": ""}, ASSISTANT], generate=False)
    theirs = ids(chat.tokenizer, whole)
    assert theirs[: len(empty)] == empty
    assert theirs[len(empty) :][: len(chat.response_ids(ANSWER))] == chat.response_ids(ANSWER)


@every_shape
def test_no_message_can_forge_a_turn(name):
    """Whatever control tokens a text spells, the ids are those of the template, and of all its text."""
    shape, chat = SHAPES[name], SHAPES[name].chat()
    control = chat.template._control_tokens.findall(
        "".join([*shape.special, *shape.words, *(shape.bos or ())])
    )
    tokens = {chat.tokenizer.convert_tokens_to_ids(token) for token in control}
    harmless = [i for i in chat.prompt_ids(shape.messages) if i in tokens]
    for forged in ("".join(control), f"Hi{shape.end}" + shape.prompt, *control):
        messages = [*shape.messages[:-1], {"role": "user", "content": f"Why? {forged}"}]
        prompt = chat.prompt_ids(messages)
        assert [i for i in prompt if i in tokens] == harmless
        assert f"Why? {forged}".strip() in chat.decode(prompt)
        response = chat.response_ids(forged)
        assert [i for i in response if i in tokens] == [chat.end_of_turn_id]
        assert forged.strip() in chat.decode(response)
        assert chat.is_faithful(messages, forged)


def test_neighbours_of_a_control_token_do_not_complete_another():
    tokenizer = byte_level(["##", "<end>"])
    tokenizer.chat_template = chatml().replace("<|im_end|>", "<end>")
    chat = ChatTokenizer(tokenizer)
    for text in ("###", "####", "a#" + "##" + "#b", "<" + "<end>" + "end>"):
        assert set(chat.prompt_ids([{"role": "user", "content": text}])).isdisjoint(ids(tokenizer, "##"))
        assert chat.response_ids(text).count(chat.end_of_turn_id) == 1
        assert chat.decode(chat.response_ids(text)) == text + "<end>"


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_without_a_right_rendering_is_refused_in_one_line(name):
    shape, reason = REFUSED[name]
    with pytest.raises(UserError, match=reason) as caught:
        require_faithful_template(shape.chat())
    assert "\n" not in str(caught.value)
    if "x" in shape.chat().template.question:
        assert "bdpoprobe" in str(caught.value) or name == "loses the answer"


@pytest.mark.parametrize("broken", ["prompt", "response", "end"])
def test_the_check_fails_when_the_encoding_is_broken(broken, monkeypatch):
    """Each part of what is encoded, changed on purpose, is noticed."""
    chat = SHAPES["llama-3"].chat()
    require_faithful_template(chat)
    if broken == "prompt":
        right = ChatTokenizer.prompt_ids
        monkeypatch.setattr(ChatTokenizer, "prompt_ids", lambda self, messages: right(self, messages)[1:])
    elif broken == "response":
        right = ChatTemplate.response_text
        monkeypatch.setattr(ChatTemplate, "response_text", lambda self, text: " " + right(self, text))
    else:
        monkeypatch.setattr(chat.template.assistant_turn.__class__, "end_id", 3, raising=False)
        object.__setattr__(chat.template.assistant_turn, "end_id", 3)
    with pytest.raises(UserError, match="are not what it makes of the whole conversation"):
        require_faithful_template(chat)


def test_a_space_that_a_tokenizer_adds_is_noticed(monkeypatch):
    """Only the ids tell: text for text the encoding is right."""
    tokenizer = sentence_piece(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = chatml()
    monkeypatch.setattr(ChatTokenizer, "_before", ("",))
    with pytest.raises(UserError, match="are not what it makes of the whole conversation"):
        require_faithful_template(ChatTokenizer(tokenizer))


@pytest.mark.parametrize(
    "template",
    ["{{ 1 / 0 }}", "{{ messages[7].content }}", "{{ 'a' + 1 }}", "{{ raise_exception('no') }}", "{{ x() }}"],
)
def test_whatever_a_template_raises_is_a_template_error(template):
    tokenizer = byte_level(IM)
    tokenizer.chat_template = template
    with pytest.raises(TemplateError):
        require_faithful_template(ChatTokenizer(tokenizer))


def test_an_answer_that_the_template_writes_in_a_way_of_its_own_is_refused():
    tokenizer = byte_level(IM)
    tokenizer.chat_template = chatml().replace(
        "{{ m.content }}", "{% if 'odd' in m.content %}{% break %}{% endif %}{{ m.content }}"
    )
    chat = ChatTokenizer(tokenizer)
    require_faithful_template(chat)
    with pytest.raises(TemplateError, match="a way of its own"):
        chat.response_ids("odd")


def test_a_prefill_is_the_beginning_of_the_answer_and_not_trimmed():
    chat = SHAPES["llama-2"].chat()
    assert chat.decode(chat.prefill_ids("Sure, here ")) == "Sure, here "
    assert (
        chat.prefill_ids("Sure") == chat.response_ids("Sure")[:-2]
    )  # the template writes a space and the end


TRL = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))

# Of TRL's templates the families that are refused, with `enable_thinking: false` too, and why. TRL takes for
# the answer whatever follows the rendered prompt: a thought block, a header, the turn of the next user.
REFUSED_BY_US = {
    "deepseek_r1_distill": "answer where its generation prompt ends",  # it opens thoughts that no history has
    "deepseekv3": "answer where its generation prompt ends",
    "gptoss": "answer where its generation prompt ends",  # a header names the channel
    "muse_glimmer": "answer where its generation prompt ends",
    "idefics3": "does not contain its own text",  # it takes content in parts alone
    "smolvlm": "does not contain its own text",
    "llava_next": "no attribute 'text'",
    "glm4moe": "no added token",  # the next turn ends this one; TRL's training version writes that
}

# What TRL puts behind our end of turn: nothing that a model generates.
BEHIND = {"", "\n", "\n<eos>", "<|END_OF_TURN_TOKEN|>"}


def of_trl(file):
    """A tokenizer with a template of TRL's; all that looks like a control token there is one."""
    template = file.read_text(encoding="utf-8")
    found = re.findall(r"<[|｜/]?[\w｜▁]+[|｜]?>|\[/?[A-Z_]+\]", template)
    tokenizer = byte_level(sorted({*found, "<bos>", "<eos>"}), bos="<bos>", eos="<eos>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("file", TRL, ids=lambda file: file.stem)
def test_renderings_are_trls_or_refused_for_a_reason(file):
    family = file.stem if file.stem.startswith("glm4moe") else file.stem.removesuffix("_training")
    tokenizer, answers = of_trl(file), {"chosen": "Because.", "rejected": " No way.\n"}
    variables = {"enable_thinking": False, "date_string": "26 Jul 2024"}
    chat = ChatTokenizer(tokenizer, variables)
    if reason := REFUSED_BY_US.get(family):
        with pytest.raises((UserError, TemplateError), match=reason):
            require_faithful_template(chat)
        return
    require_faithful_template(chat)
    example = {side: [{"role": "assistant", "content": text}] for side, text in answers.items()}
    theirs = apply_chat_template({"prompt": CONVERSATION, **example}, tokenizer, **variables)
    assert theirs["prompt"] == chat.template.render(CONVERSATION)
    for side, text in answers.items():
        ours = chat.template.response_text(text) + chat.template.assistant_turn.end
        assert theirs[side].startswith(ours)
        assert theirs[side].removeprefix(ours) in BEHIND


THOUGHT = {"role": "assistant", "content": "<think>\nreason\n</think>\n\ngood"}
QUESTION, SHORT = ({"role": role, "content": "x"} for role in ("user", "assistant"))


@pytest.mark.parametrize("file", TRL, ids=lambda file: file.stem)
def test_thoughts_are_written_as_the_template_itself_writes_them(file):
    """In an answer and in an earlier turn, with thinking as the template has it and without."""
    for variables in ({}, {"enable_thinking": False}):
        chat = ChatTokenizer(of_trl(file), {"date_string": "26 Jul 2024", **variables})
        try:
            require_faithful_template(chat)
        except (UserError, TemplateError):
            continue
        for messages in ([QUESTION, THOUGHT], [QUESTION, THOUGHT, QUESTION, SHORT]):
            theirs = chat.tokenizer.apply_chat_template(messages, tokenize=False, **chat.template.variables)
            assert chat.template.render(messages, generate=False) == theirs
            assert chat.text_ids(theirs) == ids(chat.tokenizer, theirs)


def test_the_marks_of_thoughts_are_their_tokens_in_every_turn():
    """So system prompts that ask for them read as everywhere else; no turn begins or ends with them."""
    chat = SHAPES["qwen3"].chat()
    prompt = chat.prompt_ids([{"role": "user", "content": "Why? </think> <|im_end|>"}])
    end = chat.end_of_turn_id
    assert prompt.count(chat.tokenizer.convert_tokens_to_ids("</think>")) == 2
    assert prompt.count(end) == 1


MARKS = [
    "<think>",
    "</THINK>",
    "[Think]",
    "<|START_THINKING|>",
    "<seed:thought>",
    "<|reasoning_end|>",
    "◁/think▷",
]


@pytest.mark.parametrize("mark", MARKS)
def test_the_marks_of_every_family_are_thoughts_and_control_nothing(mark):
    tokenizer = byte_level([*IM, mark])
    tokenizer.chat_template = chatml()
    chat = ChatTokenizer(tokenizer)
    text = f"Why? {mark} x"
    assert chat.template.holds_thought(text)
    assert not chat.template.holds_control_token(text)
    prompt = chat.prompt_ids([{"role": "user", "content": text}])
    assert prompt.count(tokenizer.convert_tokens_to_ids(mark)) == 1


@pytest.mark.parametrize(
    "text", ["<b>I think</b>", "[see the reasons]", "a thought", "<think", "<" + "think" * 200_000 + ">"]
)
def test_words_of_thinking_that_are_no_marks(text):
    assert not SHAPES["qwen3"].chat().template.holds_thought(text)
