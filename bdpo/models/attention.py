"""Which attention takes the shared rows: FlexAttention where it proves itself on this very device, else SDPA.

FlexAttention compiles a kernel that skips what a mask hides; how well depends on torch, the GPU and the
heads of the model. So it is tried before it is used: a layer as wide as the model's, rows of several
shapes, forward and backward, against SDPA.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from bdpo.config import Config
from bdpo.errors import first_line
from bdpo.models.architectures import VOCABULARY, one_layer
from bdpo.models.loading import model_config, plain_attention
from bdpo.models.logps import LogpsModel
from bdpo.models.packing import Batch, PrefixGroups
from bdpo.models.row_layout import prefix_sharing_obstacle

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


log = logging.getLogger(__name__)

# (context, response, response) tokens of the groups of a batch. Kernels are compiled for the first two
# and for single rows; after them no shape may need another.
FIRST_SHAPES = [[(70, 90, 40)] * 9, [(130, 200, 60)] * 7, [(300, 150, 160)]]

MORE_SHAPES = [[(90, 20, 70)] * 8, [(200, 333, 100)] * 5, [(41, 201, 99), (500, 80, 100)]]

# How much further than SDPA's FlexAttention's log-probs may be from those in float32.
TOLERANCE = 3.0


def attention_of(config: Config, device: torch.device) -> str:
    """What `model.attn_implementation` means for shared rows on this device.

    On CPU FlexAttention is SDPA: there it has no backward.
    """
    model = config.model
    if model.attn_implementation not in ("auto", "flex_attention"):
        return model.attn_implementation
    hf_config = model_config(model)
    plain = plain_attention(model, hf_config)
    if device.type != "cuda" or prefix_sharing_obstacle(hf_config, config.data.max_length):
        return plain
    if model.attn_implementation == "flex_attention":
        return "flex_attention"
    why = why_not_flex(hf_config, getattr(torch, model.dtype), device, config.data.max_length)
    log.info("attention: %s", f"SDPA, for FlexAttention {why}" if why else "FlexAttention")
    return "sdpa" if why else "flex_attention"


def why_not_flex(
    hf_config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, max_length: int
) -> str | None:
    """What FlexAttention gets wrong or cannot do here, in words that follow its name, or None."""
    _leave_room_for_compilations()
    try:
        exact, sdpa, flex = (
            LogpsModel(one_layer(hf_config, kind, of, device), max_length)
            for kind, of in (("sdpa", torch.float32), ("sdpa", dtype), ("flex_attention", dtype))
        )
        if not flex.layout.shared:
            return "is of no use to rows that are not shared"
        for batch in map(sdpa.layout.pack, map(_groups, FIRST_SHAPES)):
            if why := _differs(exact, sdpa, flex, batch):
                return why
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch in map(sdpa.layout.pack, map(_groups, MORE_SHAPES)):
                if why := _differs(exact, sdpa, flex, batch):
                    return why
    except Exception as error:  # of a compiler, a driver or a library: whatever it is, SDPA works
        return f"fails ({type(error).__name__}: {first_line(error)})"
    return None


def _leave_room_for_compilations() -> None:
    """Dynamo gives up on a function after 8 compilations and runs it uncompiled from then on.

    The trial takes two shapes (then dynamic ones) in three modes for each of two dtypes; a run needs as many.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)


def _groups(lengths: list[tuple[int, int, int]]) -> PrefixGroups:
    return PrefixGroups.of(
        [[(number * step) % VOCABULARY for step in range(1, n + 1)] for n in of_group]
        for number, of_group in enumerate(lengths, 1)
    )


def _differs(exact: LogpsModel, sdpa: LogpsModel, flex: LogpsModel, batch: Batch) -> str | None:
    """Whether log-probs or gradients are further from those in float32 than SDPA's are."""
    # Each mode is a compilation of its own: scoring infers, held-out pairs go through without gradients.
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            scored = [model(batch) for model in (exact, sdpa, flex)]
        if _worse(*scored):
            return "computes other log-probs than SDPA"
    for model in (exact, sdpa, flex):
        model.zero_grad()
        model(batch).sum().backward()
    if _worse(*map(_gradient, (exact, sdpa, flex))):
        return "computes another gradient than SDPA"
    return None


def _gradient(model: LogpsModel) -> torch.Tensor:
    """All of it: the biases of keys alone have none but what rounding leaves."""
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


def _worse(exact: torch.Tensor, sdpa: torch.Tensor, flex: torch.Tensor) -> bool:
    distance = [float((each.float() - exact).norm() / exact.norm()) for each in (sdpa, flex)]
    return not distance[1] <= TOLERANCE * distance[0] + 1e-5
