"""What an architecture computes, found out on one random layer of it: no weights, no list of names."""

from __future__ import annotations

import copy
import json
import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


VOCABULARY = 64  # of the layer


def one_layer(
    hf_config: PreTrainedConfig, attention: str, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The first layer of the model: its true heads, next to nothing else; always the same random weights."""
    return _build(_first_layer(hf_config), attention).to(dtype).to(device).eval()


def has_plain_lm_head(hf_config: PreTrainedConfig) -> bool:
    """Whether a model's logits are its output head applied to its last hidden state, to rounding.

    Some scale or cap them (Cohere, Granite, Gemma 2). What cannot be built or run is taken for one of those.
    """
    if hf_config.get_text_config() is not hf_config:  # it has several parts, all of which would be built
        return False
    kind: Any = type(hf_config)
    return _has_plain_lm_head(kind, hf_config.to_json_string(use_diff=False))


@lru_cache
def _has_plain_lm_head(kind: Any, values: str) -> bool:
    try:
        # A model may be on its way to the meta device, or in a mode of a caller that watches it.
        with torch.device("cpu"), torch.inference_mode():
            model = _build(_first_layer(kind.from_dict(json.loads(values))), "eager").float().eval()
            ids = torch.arange(2, 2 + 2 * 24).view(2, 24) % VOCABULARY
            seen = torch.ones_like(ids, dtype=torch.bool)
            seen[1, 16:] = False
            inputs = {"input_ids": ids, "attention_mask": seen, "use_cache": False}
            head, own = model.get_output_embeddings(), model(**inputs).logits[seen]
            hidden = model.base_model(**inputs).last_hidden_state[seen]
            torch.testing.assert_close(F.linear(hidden, head.weight, head.bias), own, rtol=1e-5, atol=1e-5)
    except Exception:  # of any architecture's code: whatever it is, its own logits are right
        return False
    return True


def trains_as_it_scores(hf_config: PreTrainedConfig) -> bool:
    """Whether a model without dropout computes the same logits in training mode as in evaluation mode.

    Some do not: PhiMoE routes tokens to experts at random in training, by a jitter that is part of what it
    computes in evaluation, so it cannot be set to zero. What cannot be built or run here is
    taken to do so: of methods with a reference the first step finds out.
    """
    try:
        with torch.device("cpu"), torch.inference_mode():
            model = _build(_first_layer(hf_config), "eager").float().eval()
            switch_off_dropout(model)
            ids = (torch.arange(2, 2 + 2 * 24).view(2, 24) % VOCABULARY).flip(0)
            scored = model(input_ids=ids, use_cache=False).logits
            trained = model.train()(input_ids=ids, use_cache=False).logits
    except Exception:  # of any architecture's code
        return True
    return torch.allclose(trained, scored, rtol=1e-4, atol=1e-4)


def switch_off_dropout(model: PreTrainedModel) -> None:
    """Make a forward in training mode the same every time: no dropout and no layer drop of any kind.

    With dropout the policy differs from the reference before the first step; TRL switches it off, too.
    Modules keep their rates as attributes, in `nn.Dropout`, or read them from the config in every forward.
    Of that they get a copy: the config of the model itself is exported, with the rates it came with.
    """
    quiet: dict[int, Any] = {}
    for module in model.modules():
        _set_dropout_rates_to_zero(module)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        config = getattr(module, "config", None)
        if module is not model and hasattr(config, "to_dict"):
            if id(config) not in quiet:
                quiet[id(config)] = copy.deepcopy(config)
                _set_dropout_rates_to_zero(quiet[id(config)])
            module.config = quiet[id(config)]


def _set_dropout_rates_to_zero(holder: Any) -> None:
    for name, value in vars(holder).items():
        if isinstance(value, float) and "drop" in name:
            setattr(holder, name, 0.0)


def _first_layer(hf_config: PreTrainedConfig) -> PreTrainedConfig:
    hf_config = copy.deepcopy(hf_config)
    hf_config.num_hidden_layers, hf_config.vocab_size = 1, VOCABULARY
    for width in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        if getattr(hf_config, width, None):
            setattr(hf_config, width, 64)
    # so that tokens choose whom they look at
    hf_config.initializer_range = 2 / math.sqrt(hf_config.hidden_size)
    hf_config.pad_token_id = hf_config.bos_token_id = hf_config.eos_token_id = None
    if len(getattr(hf_config, "layer_types", None) or ()) > 1:
        hf_config.layer_types = hf_config.layer_types[:1]
    return hf_config


def _build(hf_config: PreTrainedConfig, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(
            hf_config, attn_implementation=attention, trust_remote_code=False
        )
