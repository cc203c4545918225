"""Signs of life of a model at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def before_each_layer(model: nn.Module, call: Callable[[], None]) -> None:
    """Have `call` called before each forward of a layer, which is an element of any `ModuleList`.

    So it is called within a batch that takes a CPU minutes, and between the tokens of an answer. On a GPU it
    is called when a layer is launched; the driver lets launches run ahead of the work by a few forwards only.
    """

    def hook(*_: Any) -> None:
        call()

    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module:
                layer.register_forward_pre_hook(hook)
