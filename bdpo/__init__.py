"""Safety alignment of language models with Balanced DPO (arXiv 2603.22829).

This package is the method and everything that is not Ray. Data flows one way:
data -> tokens -> packing -> logps -> mi -> losses -> training -> evaluation.

For training code of one's own it offers the method as functions of tensors (docs/python.md). They are
imported when they are first asked for, so that `import bdpo` does not wait for torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("bdpo")

_OFFERED = {
    "balance_weights": "bdpo.method.functional",
    "bdpo_loss": "bdpo.method.functional",
    "mutual_information": "bdpo.method.mi",
}

__all__ = ["__version__", *_OFFERED]


def __getattr__(name: str) -> Any:
    if name not in _OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_OFFERED[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OFFERED})
