"""The folder of a model, its loading, and the digest of its content.

Only safetensors are read; code from a model folder runs only with `model.trust_remote_code`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.metadata import version as _version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import InvalidVersion, Version

from bdpo.config import SANDBOX, Config, ModelConfig
from bdpo.errors import UserError, escaped
from bdpo.models.folders import OF_WEIGHTS, OWN_CODE, named_folder, reason_of, require_readable_files
from bdpo.models.transformers_private import places_of, set_attention, supports_sdpa
from bdpo.models.weight_files import (
    UNQUANTISED,
    counted,
    files_of_tensors,
    is_finite,
    not_finite,
    require_numbered,
    require_one_value,
    require_weight_files,
)
from bdpo.sandbox import sandbox_seed
from bdpo.storage.cache import cached_copy
from bdpo.storage.checksums import require_checksums
from bdpo.storage.digests import cached_sha256, files_digest
from bdpo.storage.paths import local_path

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


log = logging.getLogger(__name__)


def model_folder(model: ModelConfig, key: str = "model.name_or_path") -> Path:
    """The local folder of a model: the sandbox's, a folder as named, or the cached one of a URL or the hub.

    `key` is where the name stands, for errors.

    Raises:
        UserError: nothing is found under the name, its safetensors weights or its JSON files are missing or
            damaged, or a model that was exported here is not as it was exported.
    """
    if model.name_or_path == SANDBOX:
        from bdpo.sandbox import sandbox_folder

        return sandbox_folder(sandbox_seed(model)) / "model"
    named = f"{key}={escaped(model.name_or_path)}"
    if model.revision and ("://" in model.name_or_path or os.path.isdir(local_path(model.name_or_path))):
        raise UserError(
            f"model.revision={model.revision}: {named} is a folder, which has no revisions; leave it out"
        )
    if "://" in model.name_or_path:
        folder = cached_copy(model.name_or_path, key)
    elif model.name_or_path.lower().endswith(".gguf"):
        raise UserError(f"{named}: GGUF is not read; name its original model")
    else:
        folder = named_folder(model.name_or_path, key, model.revision)
    if not (folder / "config.json").is_file():
        what = "has no config.json"
        if (folder / "adapter_config.json").is_file():
            what = "holds an adapter without its base; merge the two (evaluate.adapter evaluates one)"
        raise UserError(f"{named}: the folder {what}")
    require_weight_files(folder, named)
    require_checksums(folder)
    require_readable_files(folder)
    return folder.resolve()


def model_config(model: ModelConfig) -> PreTrainedConfig:
    """The architecture of a model, without its weights, as `load_model` builds it.

    Raises:
        UserError: transformers does not know it, or knows it by code that the folder brings.
    """
    return architecture(model_folder(model), model)


def architecture(folder: Path, model: ModelConfig) -> PreTrainedConfig:
    """The same of the model in a folder, with the other settings of `model`."""
    from transformers import AutoConfig

    try:
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # of a class that validates what a file of somebody else holds
        raise _not_loaded(folder, error) from None
    if getattr(hf_config, "quantization_config", None):
        raise UserError(f"{folder}: config.json is of quantised weights, which are not read; {UNQUANTISED}")
    set_attention(hf_config, plain_attention(model, hf_config))
    return hf_config


def plain_attention(model: ModelConfig, hf_config: PreTrainedConfig) -> str:
    """The attention of rows that are not shared: there FlexAttention has nothing to skip.

    Where `model.attn_implementation` leaves the choice it is SDPA, or eager for architectures without SDPA.
    """
    if model.attn_implementation not in ("auto", "flex_attention"):
        return model.attn_implementation
    if supports_sdpa(hf_config):
        return "sdpa"
    warn_once(f"attention: eager, since transformers has no SDPA for {hf_config.model_type} models")
    return "eager"


@lru_cache
def warn_once(message: str) -> None:
    """Log a warning, unless this process has logged it before."""
    log.warning(message)


def newer_than_installed(hf_config: PreTrainedConfig) -> str | None:
    """What to look at if a newer transformers wrote config.json, which transformers reads without a word.

    A type that the installed one does not know is refused; a type that has changed since may compute
    something else.
    """
    written, installed = hf_config.transformers_version or "", _version("transformers")
    with suppress(InvalidVersion):
        if Version(written).release[:2] > Version(installed).release[:2]:
            return (
                f"config.json is of transformers {escaped(written)}, installed is {installed}: a newer "
                f"{hf_config.model_type} may compute something else"
            )
    return None


def _not_loaded(folder: Path, error: Exception) -> UserError:
    """What is wrong with a folder, in one line: transformers' own errors have a page of advice."""
    text = str(error)
    if "trust_remote_code" in text:
        return UserError(f"{folder}: the model {OWN_CODE}")
    if "does not recognize this architecture" in text or "Unrecognized model in" in text:
        return UserError(f"{folder}: transformers {_version('transformers')} knows no model of this type")
    reason = reason_of(error, folder / "config.json")
    if "automatic conversion" in text:  # its report would follow, which `_quiet` hides
        reason = "some of the tensors that it puts together are missing, or of another shape"
    return UserError(f"{folder}: cannot be loaded as a causal language model ({reason})")


def positions_of(hf_config: PreTrainedConfig) -> int | None:
    """How many positions a model has; None where its config names no limit."""
    positions: int | None = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    return positions


def has_positions(hf_config: PreTrainedConfig, tokens: int) -> bool:
    """Whether a model has positions for so many tokens: those of a prompt and of the answer behind it."""
    positions = positions_of(hf_config)
    return positions is None or tokens <= positions


def require_positions(config: Config) -> None:
    """Make sure that the model has a position for each of `data.max_length` tokens, always the same one.

    Raises:
        UserError: it has fewer, or a long row would change what positions mean to all rows beside it.
    """
    require_positions_for(config.data.max_length, model_config(config.model), config.model.name_or_path)


def require_positions_for(max_length: int, hf_config: PreTrainedConfig, name: str) -> None:
    """The same of a model in memory; `name` is what an error calls it."""
    positions = positions_of(hf_config)
    rope = getattr(hf_config.get_text_config(), "rope_parameters", None) or {}
    for of_layers in [rope, *(each for each in rope.values() if isinstance(each, dict))]:
        # Of these transformers asks the longest row of a batch.
        if of_layers.get("rope_type") in ("dynamic", "longrope"):
            positions = of_layers.get("original_max_position_embeddings") or positions
    if positions is not None and positions < max_length:
        raise UserError(
            f"data.max_length={max_length}: {name} has no more than {positions} positions that mean the same "
            "in every batch; lower it"
        )


def load_model(folder: Path, model: ModelConfig, attention: str | None = None) -> PreTrainedModel:
    """The causal language model of a folder, in `model.dtype`, on the CPU (or where ZeRO-3 puts it).

    `attention` is how shared rows are attended to, see `bdpo.models.attention`; without it the model has
    none.

    Names and shapes come first: a config.json that leaves out its sizes is of a model of 7B parameters, which
    would be built before it is found to be another. Under ZeRO-3 every worker of the process group must call
    this, and `require_complete_weights` comes before.

    Raises:
        UserError: the folder is not a causal language model that transformers can load, or its weights are
            not complete and finite; the tensors are named.
    """
    import torch

    if not _partitioned():
        _require_complete(folder, model)
    loaded, report = _from_pretrained(
        folder,
        model,
        dtype=getattr(torch, model.dtype),
        attn_implementation=attention or plain_attention(model, architecture(folder, model)),
    )
    _refuse_incomplete(folder, report)
    require_finite(loaded, folder)
    return loaded


def require_complete_weights(model: ModelConfig, key: str = "model.name_or_path") -> None:
    """Make sure that the weights are those of the architecture, by name and shape, without reading them.

    It takes a fraction of a second: commands look before they start anything. `load_model` looks, too,
    but not under ZeRO-3, where transformers reports no tensor that is too many. `key` is where the name of
    the model stands.

    Raises:
        UserError: they are not, or two that config.json ties differ; the tensors are named.
    """
    _require_complete(model_folder(model, key), model)


def _require_complete(folder: Path, model: ModelConfig) -> None:
    """The same of the model in a folder."""
    require_numbered(folder, places_of(without_weights(folder, model), files_of_tensors(folder)))
    settings = {"device_map": "meta", "dtype": model.dtype}
    # `ignore_mismatched_sizes`, so that the report has them all.
    loaded, report = _from_pretrained(folder, model, **settings, ignore_mismatched_sizes=True)
    _refuse_incomplete(folder, report)
    prefix = f"{loaded.base_model_prefix}."  # which the names in a file may lack
    for tied in loaded.all_tied_weights_keys.items():
        require_one_value(folder, {*tied, *(name.removeprefix(prefix) for name in tied)})
    if note := newer_than_installed(loaded.config):
        warn_once(f"{folder}: {note}")


def without_weights(folder: Path, model: ModelConfig) -> PreTrainedModel:
    """The model of a folder on PyTorch's meta device, where it has shapes alone.

    Raises:
        UserError: transformers cannot build it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    hf_config, auto = architecture(folder, model), AutoModelForCausalLM
    try:
        with torch.device("meta"):
            built: PreTrainedModel = auto.from_config(hf_config, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # as in `architecture`
        raise _not_loaded(folder, error) from None
    return built


def _from_pretrained(folder: Path, model: ModelConfig, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """The model and transformers' report of its loading."""
    from transformers import AutoModelForCausalLM

    from bdpo.models.oom import out_of_memory  # imports torch

    auto: Any = AutoModelForCausalLM  # its annotations know no report
    try:
        with _quiet():
            loaded, report = auto.from_pretrained(
                folder,
                trust_remote_code=model.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **settings,
            )
    except Exception as error:  # as in `architecture`
        if out_of_memory(error):
            raise
        raise _not_loaded(folder, error) from None
    return loaded, report


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of all workers, and the advice in the report that `_refuse_incomplete` reads."""
    from transformers.utils import logging as theirs

    verbosity, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(verbosity)
        if bars:
            theirs.enable_progress_bar()


def _refuse_incomplete(folder: Path, report: dict[str, Any]) -> None:
    """transformers makes up what is missing at random and leaves out what is too many."""
    wrong = {
        "missing": sorted(report["missing_keys"]),
        "of another shape": sorted(name for name, *_ in report["mismatched_keys"]),
        "unknown to the architecture": sorted(report["unexpected_keys"]),
    }
    if found := "; ".join(filter(None, [counted(wrong), *map(escaped, report["error_msgs"])])):
        raise UserError(f"{folder}: the weights are not those of the model: tensors {found}")


def require_finite(model: PreTrainedModel, folder: Path) -> None:
    """Make sure that all weights are numbers, and the buffers that were saved with them.

    Each worker of ZeRO-3 looks at its part of each weight; buffers are not partitioned.

    Raises:
        UserError: some are not; the tensors are named.
    """
    import torch

    from bdpo.models.deepspeed_internals import own_part

    saved = model.state_dict().keys()
    buffers = ((name, values) for name, values in model.named_buffers() if name in saved)
    parts_of_it = ((name, own_part(values)) for name, values in model.named_parameters())
    bad = [name for name, values in chain(parts_of_it, buffers) if not is_finite(values)]
    if _partitioned():
        parts: list[list[str]] = [bad] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, bad)
        bad = sorted(set(chain(*parts)))
    if bad:
        raise not_finite(folder, bad)


def _partitioned() -> bool:
    """Whether `from_pretrained` partitions what it loads."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def weights_digest(folder: Path) -> str:
    """Digest of weights, config and code of a model: of their content, whatever the folder is called.

    A file of weights is read once on a machine, for as long as it is the same file.
    """
    files = (sorted(folder.glob(pattern)) for pattern in OF_WEIGHTS)
    return files_digest(list(chain(*files)), digest_of=cached_sha256)
