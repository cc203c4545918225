"""The safetensors files of a model folder: which of them are read, all there, intact, of plain floats."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from bdpo.errors import UserError, escaped, first_line
from bdpo.models.folders import read_json_object
from bdpo.storage.paths import require_fetched

if TYPE_CHECKING:
    import torch

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

# Of bytes and 8-bit floats nothing but a quantiser knows the scales.
_PLAIN_WEIGHTS = {"F64", "F32", "F16", "BF16"}

UNQUANTISED = "name the model in float32, bfloat16 or float16"

# What publishers put beside the weights: Mistral's own format, an adapter's weights, the state of an
# optimizer, and variants, which `from_pretrained` reads only where they are asked for (`variant="fp32"`).
_OTHER_KINDS = re.compile(
    r"consolidated.*|adapter_model.*|optimizer.*"
    r"|model\.\w+(?:-\d+-of-\d+)?\.safetensors|model-\d+-of-\d+\.\w+\.safetensors"
)


def require_weight_files(folder: Path, name: str) -> None:
    """Make sure of all that can be known of the weights without reading them; `name` names the folder.

    Raises:
        UserError: there are none, one is missing, damaged or cut, weights are quantised, an index names
            another file for a tensor, or the folder holds the same tensors in another file, or an adapter.
    """
    there = sorted(folder.glob("*.safetensors"))
    if not there:
        others = "; other formats are not read" if _has_other_weights(folder) else ""
        raise UserError(f"{name}: the folder has no *.safetensors weights{others}")
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{name}: the folder holds a model and an adapter (adapter_config.json), which transformers "
            "applies wherever peft is installed; move the adapter to a folder of its own, or merge the two"
        )
    read = weight_files(folder)
    missing = [file.name for file in read if file not in there and not file.is_file()]
    if missing == [_SINGLE]:
        raise UserError(f"{name}: the folder has neither {_SINGLE} nor {_INDEX}, which names other files")
    if missing:
        raise UserError(f"{name}: files of weights are missing ({some_names(missing)})")
    tensors: dict[str, str] = {}
    for file in read + [one for one in there if one not in read and not _OTHER_KINDS.fullmatch(one.name)]:
        found = _plain_tensors(file) if file in read else set(tensor_types(file))
        if again := sorted(tensors.keys() & found):
            raise UserError(
                f"{name}: {file.name} holds other weights of the model ({some_names(again)}) beside "
                f"{some_names([one.name for one in read if one != file])}; leave those that are meant in the "
                "folder"
            )
        tensors |= dict.fromkeys(found, file.name) if file in read else {}
    if (index := _first_file(folder)) not in read:
        for tensor, shard in _weight_map(index).items():
            if (actual := tensors.get(tensor, shard)) != shard:
                raise UserError(
                    f"{index}: names {escaped(shard)} for {escaped(tensor)}, which is in {actual}"
                )


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads the weights from, whether they exist or not.

    Raises:
        UserError: an index of sharded weights is damaged.
    """
    first = _first_file(folder)
    if not first.name.endswith(".index.json"):
        return [first]
    return [folder / shard for shard in sorted(set(_weight_map(first).values()))]


def _first_file(folder: Path) -> Path:
    """The file that is opened first: that of all weights, or the index of the others."""
    named = _named_weights(folder)
    if named is None:
        named = _INDEX if (folder / _INDEX).is_file() and not (folder / _SINGLE).is_file() else _SINGLE
    return folder / named


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> the name of its file, as an index of sharded weights has it.

    Raises:
        UserError: it is damaged.
    """
    content = read_json_object(index)
    shards = content["weight_map"].values() if isinstance(content.get("weight_map"), dict) else ()
    if not shards or not all(isinstance(shard, str) for shard in shards):
        raise UserError(f"{index}: is no index of weights (weight_map: tensor -> file)")
    if not isinstance(content.get("metadata"), dict):
        raise UserError(f"{index}: has no metadata, which transformers reads; an empty object will do")
    if outside := sorted(shard for shard in shards if Path(shard).name != shard):
        raise UserError(f"{index}: names files that are not in its folder ({escaped(some_names(outside))})")
    return dict(content["weight_map"])


def _named_weights(folder: Path) -> str | None:
    """The file that config.json names for the weights, as that of few models does."""
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["transformers_weights"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return named if isinstance(named, str) else None


def _has_other_weights(folder: Path) -> bool:
    return any(any(folder.glob(f"*.{suffix}")) for suffix in ("gguf", "bin", "pt", "pth", "ckpt"))


def tensor_types(file: Path) -> dict[str, str]:
    """Tensor -> its type in a file; the header has its length, so a cut file is found without reading it.

    Raises:
        UserError: the file is damaged, cut, or a Git LFS pointer.
    """
    from safetensors import SafetensorError, safe_open

    require_fetched(file)
    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged weights ({first_line(error)})") from None


def files_of_tensors(folder: Path) -> dict[str, Path]:
    """Tensor -> the file that it is in, of all that are read."""
    return {name: file for file in weight_files(folder) for name in tensor_types(file)}


def _plain_tensors(file: Path) -> set[str]:
    """The names of the tensors in a file, whose weights are plain floats.

    Raises:
        UserError: the file is damaged or cut, or its weights are quantised.
    """
    kinds = tensor_types(file)
    for name, kind in kinds.items():
        if name.endswith("weight") and kind not in _PLAIN_WEIGHTS:
            raise UserError(f"{file}: quantised weights are not read ({name} is {kind}); {UNQUANTISED}")
    return set(kinds)


def require_numbered(folder: Path, places: Mapping[str, Mapping[str, list[str]]]) -> None:
    """Make sure that each tensor of the files is loaded where its name says.

    transformers puts the tensors of experts together in the order of their numbers, whatever these are: a
    tensor of another number would be that of another expert. Of two tensors for one place it drops one.

    `places` is what `bdpo.models.transformers_private.places_of` finds for the tensors of the files.

    Raises:
        UserError: it is not so, or experts differ in their shapes; the tensors are named.
    """
    shapes = {name: shape for file in weight_files(folder) for name, shape in _shapes(file).items()}
    missing, too_many, mis_shaped = set(), set(), []
    for patterns in places.values():
        count = max(map(len, patterns.values()))
        for pattern, names in patterns.items():
            expected = _numbered(names[0], count) if "*" in pattern else {names[0]}
            missing |= expected - set(names)
            too_many |= set(names) - expected
            ((usual, _),) = Counter(shapes[name] for name in names).most_common(1)
            mis_shaped += [name for name in names if shapes[name] != usual]
    wrong = {
        "missing": sorted(missing),
        "without a place of their own": sorted(too_many),
        "of another shape than the others of their kind": mis_shaped,
    }
    if found := counted(wrong):
        raise UserError(f"{folder}: the weights are not those of the model: tensors {found}")


def _numbered(first: str, count: int) -> set[str]:
    """The names of which the first is given, with the numbers from 0 on in the place of its last number."""
    last = re.fullmatch(r"(.*\.)\d+(\..*)", first)
    return {f"{last[1]}{number}{last[2]}" for number in range(count)} if last else {first}


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def require_one_value(folder: Path, tied: Iterable[str]) -> None:
    """Make sure that tensors which config.json ties are equal, where the files hold more than one of them.

    What becomes of others depends on who loads them: transformers 5 unties them, under ZeRO-3 and in other
    libraries one of them is dropped. No export could be what was trained for all of these.

    Raises:
        UserError: two of them differ; they are named.
    """
    there = files_of_tensors(folder)
    for one, other in pairwise(sorted(there.keys() & set(tied))):
        if not _equal((there[one], one), (there[other], other)):
            raise UserError(
                f"{there[one]}: {one} and {other} differ, while config.json ties them (tie_word_embeddings); "
                "set that to false, or remove the tensor that is not meant"
            )


def _equal(*tensors: tuple[Path, str]) -> bool:
    """Whether two tensors of files are equal; embeddings are large, so a block of rows at a time is read."""
    import torch
    from safetensors import safe_open

    with safe_open(tensors[0][0], framework="pt") as file, safe_open(tensors[1][0], framework="pt") as other:
        one, another = file.get_slice(tensors[0][1]), other.get_slice(tensors[1][1])
        rows, *_ = shape = one.get_shape()
        return shape == another.get_shape() and all(
            torch.equal(one[start : start + 4096], another[start : start + 4096])
            for start in range(0, rows, 4096)
        )


def require_finite_files(files: Iterable[Path], folder: Path) -> None:
    """Make sure that all weights in some files of a folder are finite; each file is read once.

    `bdpo.models.loading.require_finite` looks at a model that is loaded; this is for before.

    Raises:
        UserError: some are not; the tensors are named.
    """
    from safetensors import safe_open

    bad = []
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            bad += [name for name in tensors.keys() if not is_finite(tensors.get_tensor(name))]  # noqa: SIM118
    if bad:
        raise not_finite(folder, bad)


def is_finite(values: torch.Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity: one pass, without a copy."""
    import torch

    if not values.numel() or not values.is_floating_point():
        return True
    return bool(torch.stack(values.aminmax()).isfinite().all())  # a NaN stays in both


def not_finite(folder: Path, tensors: list[str]) -> UserError:
    """The refusal of weights that are not finite."""
    return UserError(f"{folder}: NaN or infinite weights in {len(tensors)} tensors ({some_names(tensors)})")


def counted(wrong: Mapping[str, list[str]]) -> str:
    """What is wrong with how many tensors, which of them are named; empty where there are none."""
    found = (f"{len(names)} {what} ({some_names(names)})" for what, names in wrong.items() if names)
    return "; ".join(found)


def some_names(names: list[str]) -> str:
    """The first of them, for a message."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
