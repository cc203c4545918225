"""Safety alignment of language models with Balanced DPO (arXiv 2603.22829).

This package is the method and everything that is not Ray. A preference pair goes one way through its parts:
`data` prepares it, `models` computes its log-probs, `scoring` its mutual information, `method` its loss,
`training` trains on it; `evaluation` measures what became of the model.

For Python code of one's own it offers the method as functions of tensors, and scoring and evaluation in
memory (docs/python.md). They are imported when they are first asked for, so that `import bdpo` does not wait
for torch; `__init__.pyi` has their types.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("bdpo")

_OFFERED = {
    "ModelEvaluation": "bdpo.evaluation.in_memory",
    "ScoredPairs": "bdpo.scoring.in_memory",
    "balance_weights": "bdpo.method.functional",
    "bdpo_loss": "bdpo.method.functional",
    "evaluate_model": "bdpo.evaluation.in_memory",
    "mutual_information": "bdpo.method.mi",
    "score_pairs": "bdpo.scoring.in_memory",
}

__all__ = ["__version__", *_OFFERED]


def __getattr__(name: str) -> Any:
    if name not in _OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_OFFERED[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OFFERED})
