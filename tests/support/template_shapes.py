"""Chat templates with the shapes of published families, in wording of our own, and what they must write.

Each is beside the rendering, written by hand from the family's documentation, of

    [system "Be kind."] user "Hello", assistant "Yes?", user "Why?" -> " Because.\\n"

up to the generation prompt, and then of the answer up to and including its end of turn.
"""

# ruff: noqa: E501 (renderings are easier to compare unbroken)
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from bdpo.models.template import Message
from bdpo.models.tokenizer import ChatTokenizer
from tests.support.tokenizers import byte_level, sentence_piece

SYSTEM = Message(role="system", content="Be kind.")
CONVERSATION = [
    Message(role="user", content="Hello"),
    Message(role="assistant", content="Yes?"),
    Message(role="user", content="Why?"),
]
ANSWER = " Because.\n"


@dataclass(frozen=True)
class Shape:
    """A template, its tokenizer's added tokens, and the renderings by hand."""

    template: str
    special: Sequence[str]
    prompt: str
    response: str
    end: str
    words: Sequence[str] = ()
    bos: str | None = None
    eos: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    system: bool = False
    pieces: str | None = None  # prepend scheme of a SentencePiece tokenizer

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer with the template."""
        if self.pieces:
            tokenizer = sentence_piece(self.special, self.bos, self.eos, self.pieces)
        else:
            tokenizer = byte_level(self.special, self.words, self.bos, self.eos)
        tokenizer.chat_template = self.template
        return tokenizer

    def chat(self) -> ChatTokenizer:
        """The tokenizer seen through the template."""
        return ChatTokenizer(self.tokenizer(), self.kwargs)

    @property
    def messages(self) -> list[Message]:
        """The conversation that `prompt` is the rendering of."""
        return [SYSTEM, *CONVERSATION] if self.system else CONVERSATION


EACH, END = "{% for m in messages %}", "{% endfor %}"
IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def chatml(default_system: str | None = None, generation: str = "<|im_start|>assistant\n") -> str:
    """The template of ChatML; with a system turn of its own where the conversation has none."""
    own = f"<|im_start|>system\n{default_system}<|im_end|>\n"
    head = f"{{% if messages[0].role != 'system' %}}{own}{{% endif %}}" if default_system else ""
    return (
        f"{head}{EACH}<|im_start|>{{{{ m.role }}}}\n{{{{ m.content }}}}<|im_end|>\n{END}"
        f"{{% if add_generation_prompt %}}{generation}{{% endif %}}"
    )


CHATML_PROMPT = (
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
    "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
)

# Qwen3: thoughts of the last answer are written, empty where there are none.
THINKS = (
    EACH + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n" + END + "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)

# Qwen3.5: the generation prompt opens the thoughts, unless it closes them at once.
OPENS_THOUGHTS = THINKS.replace(
    "</think>\n\n{% endif %}{% endif %}", "</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)

LLAMA3 = (
    "{{ bos_token }}" + EACH + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>" + END + "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% endif %}"
)
LLAMA3_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]


def llama3_turn(role: str, text: str) -> str:
    """One turn as Llama 3's model card has it."""
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"


LLAMA3_TURNS = (
    llama3_turn("user", "Hello") + llama3_turn("assistant", "Yes?") + llama3_turn("user", "Why?")
    + "<|start_header_id|>assistant<|end_header_id|>\n\n"
)  # fmt: skip

GEMMA = (
    "{{ bos_token }}" + EACH + "{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    + END + "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)  # fmt: skip
GEMMA_TOKENS = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
GEMMA_PROMPT = (
    "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\nYes?<end_of_turn>\n"
    "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"
)

PHI_TOKENS = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]

COMMAND_TOKENS = [
    "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
]  # fmt: skip
DEEPSEEK_TOKENS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
DEEPSEEK = (
    "{{ bos_token }}" + EACH + "{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>"
    "{{ m.content }}<｜end▁of▁sentence｜>{% endif %}" + END
    + "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)  # fmt: skip

HARMONY_TOKENS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"]
HARMONY = (
    EACH + "<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}{% if m.role == 'assistant' and loop.last %}<|return|>{% else %}<|end|>{% endif %}" + END
    + "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)  # fmt: skip

SHAPES: dict[str, Shape] = {
    "llama-2": Shape(
        EACH + "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]{% else %}"
        " {{ m.content | trim }} {{ eos_token }}{% endif %}" + END,
        ["<s>", "</s>"],
        "<s>[INST] Hello [/INST] Yes? </s><s>[INST] Why? [/INST]",
        " Because. </s>",
        "</s>",
        bos="<s>", eos="</s>", pieces="first",
    ),
    "llama-3": Shape(
        LLAMA3,
        LLAMA3_TOKENS,
        "<|begin_of_text|>" + LLAMA3_TURNS,
        "Because.<|eot_id|>",
        "<|eot_id|>",
        bos="<|begin_of_text|>", eos="<|end_of_text|>",
    ),
    "llama-3.2": Shape(
        "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: "
        "{{ strftime_now('%d %b %Y') }}\n\n<|eot_id|>" + LLAMA3.removeprefix("{{ bos_token }}"),
        LLAMA3_TOKENS,
        "<|begin_of_text|>" + llama3_turn("system", "Today Date: 26 Jul 2024\n\n") + LLAMA3_TURNS,
        "Because.<|eot_id|>",
        "<|eot_id|>",
        bos="<|begin_of_text|>", eos="<|eot_id|>",
    ),
    "llama-4": Shape(
        "{{ bos_token }}" + EACH + "<|header_start|>{{ m.role }}<|header_end|>\n\n{{ m.content | trim }}<|eot|>"
        + END + "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}",
        ["<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>"],
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nHello<|eot|><|header_start|>assistant"
        "<|header_end|>\n\nYes?<|eot|><|header_start|>user<|header_end|>\n\nWhy?<|eot|><|header_start|>assistant"
        "<|header_end|>\n\n",
        "Because.<|eot|>",
        "<|eot|>",
        bos="<|begin_of_text|>", eos="<|eot|>",
    ),
    "mistral-v0.1": Shape(
        "{{ bos_token }}" + EACH + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
        "{{ m.content }}{{ eos_token }}{% endif %}" + END,
        ["<s>", "</s>"],
        "<s>[INST] Hello [/INST]Yes?</s>[INST] Why? [/INST]",
        " Because.\n</s>",
        "</s>",
        bos="<s>", eos="</s>", pieces="always",
    ),
    "mistral-v0.3": Shape(
        "{{ bos_token }}" + EACH + "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %}"
        " {{ m.content | trim }}{{ eos_token }}{% endif %}" + END,
        ["<s>", "</s>", "[INST]", "[/INST]"],
        "<s>[INST] Hello[/INST] Yes?</s>[INST] Why?[/INST]",
        " Because.</s>",
        "</s>",
        bos="<s>", eos="</s>", pieces="first",
    ),
    "qwen2": Shape(
        chatml("You are a helpful assistant."),
        IM,
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + CHATML_PROMPT,
        " Because.\n<|im_end|>",
        "<|im_end|>",
        eos="<|im_end|>",
    ),
    "qwen2.5": Shape(
        chatml("You are Qwen."),
        IM,
        "<|im_start|>system\nBe kind.<|im_end|>\n" + CHATML_PROMPT,
        " Because.\n<|im_end|>",
        "<|im_end|>",
        words=["<tool_call>", "</tool_call>"], eos="<|im_end|>", system=True,
    ),
    "qwen3": Shape(
        THINKS,
        IM,
        CHATML_PROMPT + "<think>\n\n</think>\n\n",
        " Because.\n<|im_end|>",
        "<|im_end|>",
        words=["<think>", "</think>"], eos="<|im_end|>", kwargs={"enable_thinking": False},
    ),
    "qwen3.5": Shape(
        OPENS_THOUGHTS,
        IM,
        CHATML_PROMPT + "<think>\n\n</think>\n\n",
        " Because.\n<|im_end|>",
        "<|im_end|>",
        words=["<think>", "</think>"], eos="<|im_end|>", kwargs={"enable_thinking": False},
    ),
    "gemma-2": Shape(
        GEMMA, GEMMA_TOKENS, GEMMA_PROMPT, "Because.<end_of_turn>", "<end_of_turn>", bos="<bos>", eos="<eos>"
    ),
    "gemma-3": Shape(  # runs of newlines are added tokens, too
        GEMMA.replace("<end_of_turn>\n", "<end_of_turn>\n\n"),
        [token for token in GEMMA_TOKENS if "turn" not in token],
        GEMMA_PROMPT.replace("<end_of_turn>\n", "<end_of_turn>\n\n"),
        "Because.<end_of_turn>",
        "<end_of_turn>",
        words=["\n\n", "<start_of_turn>", "<end_of_turn>"], bos="<bos>", eos="<eos>",
    ),
    "phi-3": Shape(
        EACH + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n" + END
        + "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        PHI_TOKENS,
        "<|user|>\nHello<|end|>\n<|assistant|>\nYes?<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n",
        " Because.\n<|end|>",
        "<|end|>",
        eos="<|endoftext|>",
    ),
    "phi-4": Shape(
        EACH + "<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>" + END
        + "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        [*IM, "<|im_sep|>"],
        "<|im_start|>system<|im_sep|>Be kind.<|im_end|><|im_start|>user<|im_sep|>Hello<|im_end|><|im_start|>"
        "assistant<|im_sep|>Yes?<|im_end|><|im_start|>user<|im_sep|>Why?<|im_end|><|im_start|>assistant<|im_sep|>",
        " Because.\n<|im_end|>",
        "<|im_end|>",
        eos="<|im_end|>", system=True,
    ),
    "vicuna": Shape(
        "{{ bos_token }}A chat. " + EACH + "{% if m.role == 'user' %}USER: {{ m.content }} {% else %}"
        "ASSISTANT: {{ m.content | trim }}{{ eos_token }}{% endif %}" + END
        + "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        ["<s>", "</s>"],
        "<s>A chat. USER: Hello ASSISTANT: Yes?</s>USER: Why? ASSISTANT:",
        " Because.</s>",
        "</s>",
        bos="<s>", eos="</s>", pieces="first",
    ),
    "chatml on a base model": Shape(
        chatml(), ["<s>", "</s>", "<|im_start|>", "<|im_end|>"], CHATML_PROMPT, " Because.\n<|im_end|>",
        "<|im_end|>", bos="<s>", eos="</s>", pieces="first",
    ),
    "chatml on an older base model": Shape(
        chatml().replace("m.content", "m.content | trim").replace("<|im_end|>", "</s>"), ["<s>", "</s>"], CHATML_PROMPT.replace("<|im_end|>", "</s>"),
        "Because.</s>", "</s>", bos="<s>", eos="</s>", pieces="always",
    ),
    "deepseek-v3": Shape(
        DEEPSEEK,
        DEEPSEEK_TOKENS,
        "<｜begin▁of▁sentence｜><｜User｜>Hello<｜Assistant｜>Yes?<｜end▁of▁sentence｜><｜User｜>Why?<｜Assistant｜>",
        " Because.\n<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>",
    ),
    "gpt-oss, complete": Shape(
        HARMONY.replace("<|start|>assistant{%", "<|start|>assistant<|channel|>final<|message|>{%"),
        HARMONY_TOKENS,
        "<|start|>system<|message|>Be kind.<|end|><|start|>user<|message|>Hello<|end|><|start|>assistant<|channel|>"
        "final<|message|>Yes?<|end|><|start|>user<|message|>Why?<|end|><|start|>assistant<|channel|>final<|message|>",
        " Because.\n<|return|>",
        "<|return|>",
        eos="<|return|>", system=True,
    ),
    "command-r": Shape(
        "{{ bos_token }}" + EACH + "<|START_OF_TURN_TOKEN|>{% if m.role == 'user' %}<|USER_TOKEN|>{% elif m.role == "
        "'assistant' %}<|CHATBOT_TOKEN|>{% else %}<|SYSTEM_TOKEN|>{% endif %}{{ m.content | trim }}"
        "<|END_OF_TURN_TOKEN|>" + END + "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        "{% endif %}",
        COMMAND_TOKENS,
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be kind.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>"
        "<|USER_TOKEN|>Hello<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Yes?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Why?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "Because.<|END_OF_TURN_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>", system=True,
    ),
    "olmo-2": Shape(  # the roles are plain text there; a last answer has no newline behind it
        "{{ bos_token }}" + EACH + "<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
        "{% endif %}{% if not (m.role == 'assistant' and loop.last) %}{{ '\n' }}{% endif %}" + END
        + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ["<|endoftext|>"],
        "<|endoftext|><|user|>\nHello\n<|assistant|>\nYes?<|endoftext|>\n<|user|>\nWhy?\n<|assistant|>\n",
        " Because.\n<|endoftext|>",
        "<|endoftext|>",
        bos="<|endoftext|>", eos="<|endoftext|>",
    ),
    "smollm2": Shape(
        chatml("You are SmolLM."),
        IM,
        "<|im_start|>system\nYou are SmolLM.<|im_end|>\n" + CHATML_PROMPT,
        " Because.\n<|im_end|>",
        "<|im_end|>",
        bos="<|im_start|>", eos="<|im_end|>",
    ),
    "zephyr": Shape(
        EACH + "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n" + END
        + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ["<s>", "</s>"],
        "<|user|>\nHello</s>\n<|assistant|>\nYes?</s>\n<|user|>\nWhy?</s>\n<|assistant|>\n",
        " Because.\n</s>",
        "</s>",
        bos="<s>", eos="</s>", pieces="always",
    ),
}  # fmt: skip


def refused(
    template: str, special: Sequence[str], words: Sequence[str] = (), eos: str | None = None
) -> Shape:
    """A shape without a right rendering."""
    return Shape(template, special, "", "", "", words=words, eos=eos)


REFUSED: dict[str, tuple[Shape, str]] = {
    "qwen3, thinking": (
        refused(THINKS, IM, ["<think>", "</think>"], "<|im_end|>"),
        "does not write an answer where its generation prompt ends",
    ),
    "qwen3.5, thinking": (
        refused(OPENS_THOUGHTS, IM, ["<think>", "</think>"], "<|im_end|>"),
        "does not write an answer where its generation prompt ends",
    ),
    "deepseek-r1": (
        refused(DEEPSEEK.replace("<｜Assistant｜>{% endif %}", "<｜Assistant｜><think>\n{% endif %}"), DEEPSEEK_TOKENS),
        "does not write an answer where its generation prompt ends",
    ),
    "gpt-oss": (refused(HARMONY, HARMONY_TOKENS), "does not write an answer where its generation prompt ends"),
    "no generation prompt": (
        refused(chatml().partition("{% if add_gen")[0], IM),
        "does not write an answer where its generation prompt ends",
    ),
    "no end of turn": (
        refused("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                "{% if add_generation_prompt %}assistant: {% endif %}", IM, eos="<|endoftext|>"),
        "no added token of the tokenizer ends an assistant turn",
    ),
    "words before the end of turn": (
        refused(chatml().replace("{{ m.content }}", "{{ m.content }} (over)"), IM),
        "no added token of the tokenizer ends an assistant turn",
    ),
    "loses the answer": (
        refused("{% for m in messages %}{{ m.role }}<|im_end|>{% endfor %}", IM),
        "does not contain its own text",
    ),
    "another first question in longer conversations": (
        refused("{% if messages | length > 3 and not add_generation_prompt %}(long) {% endif %}" + chatml(), IM),
        "are not what it makes of the whole conversation",
    ),
}  # fmt: skip
