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
    attn_implementation: Literal["auto", "sdpa", "flex_attention", "eager", "flash_attention_2"] = Field(
        "auto",
        description="`sdpa` and `flex_attention` forward a prompt once for both responses; `auto` is "
        "`flex_attention` on a GPU where it agrees with `sdpa` when tried, else `sdpa`",
    )
    trust_remote_code: bool = False
    chat_template: str | None = Field(None, description="Jinja file, for a tokenizer without template")

    @property
    def plain_attention(self) -> str:
        """What transformers is told where no rows are shared: FlexAttention has nothing to skip there."""
        return "sdpa" if self.attn_implementation in ("auto", "flex_attention") else self.attn_implementation
