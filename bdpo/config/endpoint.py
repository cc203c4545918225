"""Keys of a chat model behind an OpenAI-compatible endpoint: of a judge, and of an attacker."""

from __future__ import annotations

import re
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from bdpo.section import RUNTIME_ONLY, Positive, Section


def _has_host(url: str) -> bool:
    """Whether a URL has a host, and a port that there is."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


class EndpointConfig(Section):
    """Where a chat model is served; vLLM and llama.cpp serve one."""

    base_url: Annotated[str, RUNTIME_ONLY] = Field(description="of the endpoint, as http://host:8000/v1")
    model: str = Field(description="what the endpoint calls the model")
    api_key_env: Annotated[str | None, RUNTIME_ONLY] = Field(
        None, description="NAME of the environment variable with the key"
    )
    timeout: Annotated[float, RUNTIME_ONLY] = Field(
        60.0, gt=0, description="seconds for one reply, first byte sent to last received"
    )
    retries: Annotated[int, RUNTIME_ONLY] = Field(
        5, ge=0, description="of connection errors, 429 and 5xx, with backoff"
    )
    concurrency: Annotated[Positive, RUNTIME_ONLY] = Field(
        8, description="requests at the endpoint at a time"
    )

    @model_validator(mode="after")
    def _no_secret(self) -> Self:
        """Checked here and not field by field, so that no message quotes a key or a URL with a password."""
        if not re.fullmatch(r"https?://[^\s@?#]+", self.base_url) or not _has_host(self.base_url):
            raise ValueError("base_url expects http(s)://host[:port]/path, without user, password or query")
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*|", self.api_key_env or ""):
            raise ValueError(
                "api_key_env expects the NAME of an environment variable, in capitals, not the key itself"
            )
        return self

    @property
    def key_variable(self) -> str | None:
        """What `api_key_env` names."""
        return self.api_key_env or None
