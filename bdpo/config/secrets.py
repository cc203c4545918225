"""Secrets have no place in a config or a runtime_env: both are stored, shown in the dashboard and logged.

A secret is known by the name of its key, or by its value where that has a form of its own: a URL with a
password, a token as the big services issue them. No message repeats the value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from bdpo.errors import UserError

_WORDS = {"key", "token", "apikey", "pat", "passphrase", "authorization", "bearer"}
_PARTS = re.compile("secret|password|passwd|credential|private_?key")
# `judge_api_key_env`, `RAY_AUTH_TOKEN_PATH`: where a secret is to be found is none
_PLACES = {"env", "path", "file", "dir"}
_VALUE = re.compile(
    r"\w://[^/\s@]*:[^/\s@]+@"  # scheme://user:password@host
    r"|[?&][\w-]*(?:token|signature|secret|password|key)[\w-]*=[^&\s]"  # a signed URL
    r"|\b(?:hf_[A-Za-z0-9]{20}|sk-[\w-]{20}|gh[pousr]_[A-Za-z0-9]{20}|(?:AKIA|ASIA)[0-9A-Z]{16}\b)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY",
    re.IGNORECASE,
)


def refuse_secrets(values: Any, source: str) -> None:
    """Raise a UserError that names the first key of nested plain values that holds a secret."""
    for key, why in _secrets(values, ""):
        raise UserError(
            f"{source}: {key} {why}; take it out: a secret is read from the environment or a file of the "
            "nodes, never from a config or a runtime_env, which are stored and shown"
        )


def _secrets(values: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(values, dict):
        for key, value in values.items():
            inside = f"{path}.{key}" if path else str(key)
            if looks_secret(str(key)) and value not in (None, "", False):
                yield inside, "looks like a secret"
            else:
                yield from _secrets(value, inside)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _secrets(value, path)
    elif isinstance(values, str) and _VALUE.search(values):
        yield path, "holds a password or token"


def looks_secret(key: str) -> bool:
    """Whether a key of this name would hold a secret: `HF_TOKEN` does, `tokens_per_batch` does not."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()
    words = re.split(r"[^a-z0-9]+", name)
    return words[-1] not in _PLACES and (bool(_WORDS & set(words)) or bool(_PARTS.search(name)))
