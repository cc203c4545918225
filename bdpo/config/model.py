"""Section `model`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from bdpo.config.base import Section


def _text(value: Any) -> Any:
    """A revision of digits alone is a number in YAML."""
    return str(value) if type(value) is int else value


class ModelConfig(Section):
    """The language model that is scored with, trained and evaluated."""

    name_or_path: str = Field(description="hub id, local folder, or `sandbox`")
    revision: Annotated[str | None, BeforeValidator(_text)] = Field(
        None, description="hub revision; for `sandbox` the seed of its world"
    )
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attn_implementation: Literal["sdpa", "flex_attention", "eager", "flash_attention_2"] = Field(
        "sdpa",
        description="`sdpa` and `flex_attention` forward a prompt once for both responses; `flex_attention` "
        "has not been run on a GPU yet, and without one is `sdpa`",
    )
    trust_remote_code: bool = False
    chat_template: str | None = Field(None, description="Jinja file, for a tokenizer without template")
