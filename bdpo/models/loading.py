"""Where a model lies, how it is loaded, and what its content is called.

Only safetensors are read; code from a model folder runs only with `model.trust_remote_code`.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from bdpo.config import SANDBOX, Config, ModelConfig
from bdpo.errors import UserError, first_line
from bdpo.sandbox import sandbox_seed
from bdpo.storage.cache import cached_copy
from bdpo.storage.digests import cached_sha256, files_digest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]


def model_folder(model: ModelConfig) -> Path:
    """The local folder of a model: the sandbox's, a folder as named, or the cached one of a URL or the hub.

    Raises:
        UserError: nothing is found under the name, or its safetensors weights are missing or damaged.
    """
    if model.name_or_path == SANDBOX:
        from bdpo.sandbox import sandbox_folder

        return sandbox_folder(sandbox_seed(model)) / "model"
    folder = Path(model.name_or_path).expanduser()
    if "://" in model.name_or_path:
        folder = cached_copy(model.name_or_path, "model.name_or_path")
    elif not folder.is_dir():
        folder = hub_snapshot(model.name_or_path, model.revision, "model.name_or_path")
    if not (folder / "config.json").is_file():
        raise UserError(f"model.name_or_path={model.name_or_path}: the folder has no config.json")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"model.name_or_path={model.name_or_path}: the folder has no *.safetensors weights")
    for file in weights:
        _require_intact(file)
    return folder.resolve()


def _require_intact(file: Path) -> None:
    """The header of a safetensors file says how long it is: a truncated one is found without reading it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise UserError(f"{file}: damaged weights ({first_line(error)})") from None


def model_config(model: ModelConfig) -> PreTrainedConfig:
    """The architecture of a model, without its weights, as `load_model` builds it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(
        model_folder(model),
        attn_implementation=model.plain_attention,
        trust_remote_code=model.trust_remote_code,
    )


def require_positions(config: Config) -> None:
    """Make sure that the model has a position for each of `data.max_length` tokens, always the same one.

    Raises:
        UserError: it has fewer, or a long row would change what positions mean to all rows beside it.
    """
    shape, wanted = model_config(config.model).get_text_config(), config.data.max_length
    positions = getattr(shape, "max_position_embeddings", None)
    rope = getattr(shape, "rope_parameters", None) or {}
    for of_layers in [rope, *(each for each in rope.values() if isinstance(each, dict))]:
        # Of these transformers asks the longest row of a batch.
        if of_layers.get("rope_type") in ("dynamic", "longrope"):
            positions = of_layers.get("original_max_position_embeddings") or positions
    if positions is not None and positions < wanted:
        raise UserError(
            f"data.max_length={wanted}: {config.model.name_or_path} has no more than {positions} positions "
            "that mean the same in every batch; lower it"
        )


def load_model(folder: Path, model: ModelConfig, attention: str | None = None) -> PreTrainedModel:
    """The causal language model of a folder, in `model.dtype`, on the CPU (or where ZeRO-3 puts it).

    `attention` is how shared rows are attended to, see `bdpo.models.attention`; without it the model has
    none.

    Raises:
        UserError: the folder is not a causal language model that transformers can load.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, model.dtype),
            attn_implementation=attention or model.plain_attention,
            trust_remote_code=model.trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"{folder}: cannot be loaded as a causal language model ({first_line(error)})"
        ) from None


def weights_digest(folder: Path) -> str:
    """Digest of weights, config and code of a model: of their content, whatever the folder is called.

    A file of weights is read once on a machine, for as long as it is the same file.
    """
    files = (sorted(folder.glob(pattern)) for pattern in ("config.json", "*.safetensors", "*.py"))
    return files_digest(list(chain(*files)), digest_of=cached_sha256)


def hub_snapshot(name: str, revision: str | None, key: str) -> Path:
    """The cached snapshot of a hub repository; `key` is what an error names.

    Raises:
        UserError: there is none, or it is not to be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns="consolidated*"
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{key}={name}: no such folder, and not to be had from the hub ({first_line(error)})"
        ) from None
