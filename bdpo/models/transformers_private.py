"""What bdpo uses of transformers that is not public, tested with transformers 5.20 to 5.23.

`pyproject.toml` admits the versions that were tested and no later minor version. What is here has to be
checked again before that range grows; `tests/models/test_transformers_private.py` compares each of these with
what transformers itself does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from jinja2.nodes import Template
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def supports_sdpa(hf_config: PreTrainedConfig) -> bool:
    """Whether the causal language model of an architecture has SDPA or brings code of its own."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(hf_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return True
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)]
    return bool(kind._supports_sdpa)


def attention_of_config(hf_config: PreTrainedConfig) -> str | None:
    """The attention that a model of this config has, or will be built with."""
    return hf_config._attn_implementation


def set_attention(hf_config: PreTrainedConfig, attention: str) -> None:
    """Have models of this config built with an attention."""
    hf_config._attn_implementation = attention


def parsed_template(template: str) -> Template:
    """A chat template as `apply_chat_template` parses it: its Jinja knows more statements than others.

    Raises:
        TemplateError: the template is not Jinja.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment: Any = _compile_jinja_template(template).environment
    return cast("Template", environment.parse(template))


def text_renderer(
    tokenizer: PreTrainedTokenizerBase, template: str, variables: Mapping[str, Any]
) -> Callable[[list[Any], bool], str]:
    """`apply_chat_template` with these variables, for messages of role and content alone, which are texts.

    It takes the messages and `add_generation_prompt`. What `apply_chat_template` makes anew at every call, of
    which most of its time is, is made once: the variables, and the functions that a template may call. Its
    copies of the messages are left out, which differ from them where they hold more than texts.

    Raises:
        TemplateError: the template is not Jinja.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template, _plain_template_data

    compiled: Any = _compile_jinja_template(template)
    compiled.globals = dict(compiled.globals)  # Jinja's chain of mappings is read as a whole at every call
    known = {"tools": None, "documents": None} | tokenizer.special_tokens_map
    known |= cast("dict[str, Any]", _plain_template_data(variables))

    def render(messages: list[Any], generate: bool) -> str:
        return str(compiled.render({**known, "messages": messages, "add_generation_prompt": generate}))

    return render


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
