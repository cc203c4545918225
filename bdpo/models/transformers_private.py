"""What bdpo uses of transformers that is not public, tested with transformers 5.20 to 5.23.

`pyproject.toml` admits the versions that were tested and no later minor version. What is here has to be
checked again before that range grows; `tests/models/test_transformers_private.py` compares each of these with
what transformers itself does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from jinja2.nodes import Template
    from transformers import PreTrainedConfig, PreTrainedModel


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


def places_of(model: PreTrainedModel, names: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Tensor of a model -> pattern -> the tensors of files that are loaded into it, in their order there.

    A pattern with `*` is of tensors that are put together, such as those of experts; another one is the name
    of a tensor that is taken as it is. Tensors that have no place in the model are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    expected: dict[str, Any] = model.state_dict()
    places: dict[str, dict[str, list[str]]] = {}
    for name in sorted(names, key=dot_natural_key):
        place, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if place not in expected and name in expected:
            place, pattern = rename_source_key(name, [], [], model.base_model_prefix, expected)
        if place in expected:
            places.setdefault(place, {}).setdefault(pattern or place, []).append(name)
    return places
