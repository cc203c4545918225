"""What bdpo uses of transformers that is not public, tested with transformers 5.20 to 5.23.

`pyproject.toml` admits the versions that were tested and no later minor version. What is here has to be
checked again before that range grows; `tests/models/test_transformers_private.py` compares each of these with
what transformers itself does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from jinja2.nodes import Template
    from transformers import PreTrainedConfig


def supports_sdpa(shape: PreTrainedConfig) -> bool:
    """Whether the causal language model of an architecture has SDPA or brings code of its own."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(shape) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return True
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(shape)]
    return bool(kind._supports_sdpa)


def attention_of_config(shape: PreTrainedConfig) -> str | None:
    """The attention that a model of this config has, or will be built with."""
    return shape._attn_implementation


def set_attention(shape: PreTrainedConfig, attention: str) -> None:
    """Have models of this config built with an attention."""
    shape._attn_implementation = attention


def parsed_template(template: str) -> Template:
    """A chat template as `apply_chat_template` parses it: its Jinja knows more statements than others.

    Raises:
        TemplateError: the template is not Jinja.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment: Any = _compile_jinja_template(template).environment
    return cast("Template", environment.parse(template))
