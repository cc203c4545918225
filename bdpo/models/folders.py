"""The folder that a config key names for a model, an adapter or a judge: found, and its small files sound.

What transformers would skip in silence, such as a damaged generation_config.json, is refused here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any

from bdpo.errors import UserError, escaped, first_line
from bdpo.storage import strict_json
from bdpo.storage.checksums import recorded_checksums
from bdpo.storage.digests import json_digest
from bdpo.storage.paths import StoragePath, local_path, require_fetched
from bdpo.storage.strict_json import RepeatedKey

OF_WEIGHTS = ("config.json", "*.safetensors", "*.py")
"""The files of a model whose content its `weights_digest` is made of."""

OWN_CODE = (
    "brings its own code, which is not run; model.trust_remote_code=true runs that of model.name_or_path, "
    "if you trust it"
)
"""What is said of a model or a tokenizer; of a judge no code is ever run."""

_TEXTS = ["*.json", "*.model", "*.txt", "*.jinja", "*.py"]

_HUB_FILES = [*_TEXTS, "*.safetensors"]

# Small files that transformers and PEFT read; a tokenizer.json has megabytes and a reader that complains.
_JSON_OBJECTS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "adapter_config.json",
)


def named_folder(name: str, key: str, revision: str | None = None, with_weights: bool = True) -> Path:
    """A folder of this machine, or the hub's snapshot; `key` is what errors name.

    Without its weights a model of the hub is a small download.

    Raises:
        UserError: there is none.
    """
    folder = local_path(name)
    if name and os.path.isdir(folder):  # Path.is_dir raises for a name that is too long for a file
        return folder
    if name.startswith(("/", "~", ".")):
        raise UserError(f"{key}={escaped(name)}: no such folder")
    return _hub_snapshot(name, revision, key, _HUB_FILES if with_weights else _TEXTS)


def _hub_snapshot(name: str, revision: str | None, key: str, patterns: list[str]) -> Path:
    """The cached snapshot of the files of a hub repository; `key` is what an error names.

    Raises:
        UserError: there is none, or it is unavailable.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns="consolidated*"
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{key}={escaped(name)}: no such folder, and not available from the hub ({first_line(error)})"
        ) from None


def require_readable_files(folder: Path) -> None:
    """Make sure that no file but the weights is a Git LFS pointer, and that small JSON files are sound.

    Raises:
        UserError: it is not so; the file is named, and the key where it is one.
    """
    for file in sorted(chain(*map(folder.glob, _TEXTS))):
        require_fetched(file)
    for name in _JSON_OBJECTS:
        if os.path.lexists(folder / name):  # a link to nothing is a file that is lost, not one left out
            _require_token_ids(folder / name, read_json_object(folder / name))


def read_json_object(file: Path) -> Mapping[str, Any]:
    """The content of a JSON file.

    Raises:
        UserError: the file cannot be read, is no JSON, holds no object, or has a key twice.
    """
    try:
        content = strict_json.loads(file.read_text(encoding="utf-8"))
    except RepeatedKey as error:
        raise UserError(f"{file}: the key {escaped(error.key)} stands twice") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds no JSON object")
    return content


def reason_of(error: Exception, file: Path) -> str:
    """What transformers or PEFT say of a model in one line; of a value, which key of the JSON file has it."""
    if not isinstance(error, KeyError):
        return first_line(error)
    value = error.args[0] if error.args else None
    key = next(_keys_of(value, read_json_object(file)), None)
    return (
        f"{file.name}: {escaped(key)}={escaped(str(value))} is unknown" if key else f"unknown value {error}"
    )


def _keys_of(value: object, content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, held in content.items():
        if held == value:
            yield prefix + key
        elif isinstance(held, Mapping):
            yield from _keys_of(value, held, f"{prefix}{key}.")


def _require_token_ids(file: Path, content: Mapping[str, Any]) -> None:
    """Generation stops at these: another type would match no token."""
    ids = content.get("eos_token_id")
    for one in ids if isinstance(ids, list) else [ids]:
        if one is not None and type(one) is not int:
            raise UserError(f"{file}: eos_token_id is neither a token id nor a list of them")


def recorded_weights_digest(folder: StoragePath) -> str | None:
    """`weights_digest` of a model that was exported to a folder, from its record: no weights are read.

    None without such a record.

    Raises:
        UserError: the record is damaged.
    """
    recorded = recorded_checksums(folder)
    if recorded is None:
        return None
    of_weights = {name for name in recorded for pattern in OF_WEIGHTS if fnmatch(name, pattern)}
    return json_digest({name: recorded[name] for name in of_weights if "/" not in name})
