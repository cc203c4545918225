"""The safetensors files of a model folder: all there, intact, and of floating-point weights."""

from __future__ import annotations

import json
from pathlib import Path

from bdpo.errors import UserError, first_line

# Of bytes and 8-bit floats nothing but a quantiser knows the scales.
_PLAIN_WEIGHTS = {"F64", "F32", "F16", "BF16"}


def require_weight_files(folder: Path, name: str) -> None:
    """Make sure of all that can be known of the weights without reading them; `name` names the folder.

    Raises:
        UserError: there are none, one is missing, damaged or cut, or weights are quantised.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        others = "; other formats are not read" if _has_other_weights(folder) else ""
        raise UserError(f"{name}: the folder has no *.safetensors weights{others}")
    for file in weights:
        _require_intact(file)
    _require_shards(folder)


def _has_other_weights(folder: Path) -> bool:
    return any(any(folder.glob(f"*.{suffix}")) for suffix in ("gguf", "bin", "pt", "pth", "ckpt"))


def _require_intact(file: Path) -> None:
    """The header of a safetensors file says how long it is: a truncated one is found without reading it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            kinds = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged weights ({first_line(error)})") from None
    for name, kind in kinds.items():
        if name.endswith("weight") and kind not in _PLAIN_WEIGHTS:
            raise UserError(f"{file}: quantised weights are not read ({name} is {kind}); {UNQUANTISED}")


UNQUANTISED = "name the model in float32, bfloat16 or float16"


def _require_shards(folder: Path) -> None:
    """Make sure that the files are there that an index of sharded weights names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(name for name in shards if not (folder / name).is_file())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: is no index of weights") from None
    if missing:
        raise UserError(f"{index}: names files that are missing ({some_names(missing)})")


def some_names(names: list[str]) -> str:
    """The first of them, for a message."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
