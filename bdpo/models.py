"""Where a model lies, how it is loaded, and what its content is called.

Only safetensors are read; code from a model folder runs only with `model.trust_remote_code`.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from bdpo.config import SANDBOX, Config, ModelConfig
from bdpo.errors import UserError
from bdpo.storage import StoragePath, cache_folder, error_line, fetch, sha256, storage_path, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# File systems have coarse clocks: a file that changed just now could change again at the same time.
_SETTLED_NS = 2 * 10**9
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
        folder = fetched(model.name_or_path, "model.name_or_path")
    elif not folder.is_dir():
        folder = hub_snapshot(model.name_or_path, model.revision, "model.name_or_path")
    if not (folder / "config.json").is_file():
        raise UserError(f"model.name_or_path={model.name_or_path}: the folder has no config.json")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"model.name_or_path={model.name_or_path}: the folder has no *.safetensors weights")
    for file in weights:
        _require_whole(file)
    return folder.resolve()


def _require_whole(file: Path) -> None:
    """The header of a safetensors file says how long it is: a truncated one is found without reading it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise UserError(f"{file}: damaged weights ({first_line(error)})") from None


def sandbox_seed(model: ModelConfig) -> int:
    """The seed of the sandbox's world: `model.revision` if the model is the sandbox's, by default 0."""
    if model.name_or_path != SANDBOX:
        return 0
    try:
        return int(model.revision or 0)
    except ValueError:
        raise UserError(f"model.revision={model.revision}: the sandbox wants the seed of a world") from None


def with_sandbox_files(config: Config) -> Config:
    """The config with the sandbox's files in place of every data path that is `sandbox`."""
    data, evaluate = config.data, config.evaluate
    if SANDBOX not in (data.path, evaluate.strongreject_path, evaluate.xstest_path):
        return config
    from bdpo.sandbox import sandbox_folder

    folder = sandbox_folder(sandbox_seed(config.model))
    if data.path == SANDBOX:
        data = data.model_copy(update={"path": str(folder / "pairs.jsonl")})
    for benchmark in ("strongreject", "xstest"):
        if getattr(evaluate, f"{benchmark}_path") == SANDBOX:
            file = str(folder / f"{benchmark}.csv")
            evaluate = evaluate.model_copy(update={f"{benchmark}_path": file})
    return config.model_copy(update={"data": data, "evaluate": evaluate})


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

    `attention` is how shared rows are attended to, see `bdpo.attention`; without it the model has none.

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


@contextmanager
def quiet_saving() -> Iterator[None]:
    """Without the progress bar of `save_pretrained`, and without what DeepSpeed says when that imports it."""
    import torch
    from transformers.utils import logging

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def weights_digest(folder: Path) -> str:
    """Digest of weights, config and code of a model: of their content, whatever the folder is called.

    A file of weights is read once on a machine, for as long as it is the same file.
    """
    files = (sorted(folder.glob(pattern)) for pattern in ("config.json", "*.safetensors", "*.py"))
    return files_digest(list(chain(*files)), read=_read_once)


def files_digest(
    files: Sequence[StoragePath], root: Path | None = None, read: Callable[[Any], str] | None = None
) -> str:
    """SHA-256 over names (below `root`, else bare) and contents of files, as 32 hexadecimal digits.

    `read` is what tells the SHA-256 of one file.
    """
    read = read or sha256
    digests = {}
    for file in files:
        if file.is_file():
            name = str(file.relative_to(root)) if root and isinstance(file, Path) else file.name
            digests[name] = read(file)
    return json_digest(digests)


def _read_once(file: Path) -> str:
    """The file's SHA-256, kept in the cache folder together with what a change of the file would change."""
    status = file.stat()
    now = json_digest([status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino])
    kept = cache_folder() / "digests" / json_digest(str(file.resolve()))
    with _one_process(kept):
        with suppress(OSError, ValueError):
            then, digest = kept.read_text(encoding="utf-8").split()
            if then == now:
                return digest
        digest = sha256(file)
        if time.time_ns() - status.st_mtime_ns > _SETTLED_NS:
            with suppress(OSError):  # without a cache it is only slower
                write_text(kept, f"{now} {digest}")
        return digest


@contextmanager
def _one_process(kept: Path) -> Iterator[None]:
    """The actors of a node begin together: one reads, the others wait, if the cache can be written."""
    with ExitStack() as held:
        with suppress(OSError):
            lock = kept.parents[1] / "locks" / kept.name
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(lock))
        yield


def json_digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value, as 32 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def first_line(error: BaseException) -> str:
    """The first line of a library's error: enough for one line of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def fetched(url: str, key: str) -> Path:
    """The cached copy of a folder or file on object storage; `key` is what an error names.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        return fetch(storage_path(url, key))
    except UserError:
        raise
    except Exception as error:  # every protocol of fsspec has errors of its own
        raise UserError(f"{key}={url}: cannot be read ({error_line(error)})") from None


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
