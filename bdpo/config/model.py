"""Section `model`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from bdpo.section import Section

RESERVED_TEMPLATE_KWARGS = frozenset((
    "messages", "conversation", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt",
    "continue_final_message", "sanitize_control_tokens", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "strftime_now",
    "raise_exception", "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
    "mask_token",
))  # fmt: skip
"""What every rendering decides by itself: a key of that name would contradict it."""


def _text(value: Any) -> Any:
    """A revision of digits alone is a number in YAML."""
    return str(value) if type(value) is int else value


class ModelConfig(Section):
    """The language model that is scored with, trained and evaluated."""

    name_or_path: str = Field(description="hub id, local folder, or `sandbox`")
    revision: Annotated[str | None, BeforeValidator(_text)] = Field(
        None, description="hub revision; for `sandbox` the seed of its world"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="of the weights; training keeps float32 masters of them"
    )
    attn_implementation: Literal["auto", "sdpa", "flex_attention", "eager", "flash_attention_2"] = Field(
        "auto",
        description="`sdpa` and `flex_attention` forward a prompt once for both responses; `auto` is "
        "`flex_attention` on a GPU where it agrees with `sdpa` when tried, else `sdpa`, else `eager` for "
        "architectures without it",
    )
    trust_remote_code: bool = Field(False, description="run the code that comes with a model")
    chat_template: str | None = Field(None, description="Jinja file, for a tokenizer without template")
    template_kwargs: dict[str, Any] = Field(
        {},
        description="variables of the chat template for every rendering, such as `enable_thinking: false` "
        "(TRL: `chat_template_kwargs`)",
    )

    @field_validator("template_kwargs")
    @classmethod
    def _free_names_and_finite_values(cls, kwargs: dict[str, Any]) -> Any:
        if reserved := sorted(RESERVED_TEMPLATE_KWARGS & kwargs.keys()):
            raise ValueError(f"{reserved[0]} is no variable of a template; every rendering decides it itself")
        for name, value in kwargs.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):
                raise ValueError(f"{name} expects a value that JSON can hold, with finite numbers") from None
        return kwargs
