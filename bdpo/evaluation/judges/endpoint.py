"""One chat completion from an OpenAI-compatible endpoint, or the reason why there is none.

Works with OpenAI, vLLM, llama.cpp and others that have `POST <base_url>/chat/completions`. Whatever goes
wrong becomes a `Fault` with a short code: neither what was sent nor what came back is ever in a message.
Streaming, tools and several choices are left out.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError, ReadTimeoutError
from urllib3.util.retry import Retry

from bdpo.errors import UserError

MAX_REPLY_BYTES = 1 << 20

MAX_BACKOFF_SECONDS = 60.0

RETRIED = (429, 500, 502, 503, 504)


class Fault(Exception):
    """No usable reply; `code` says why: `timeout`, `connection`, `http_401`, `empty`, `not_json`, ..."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True)
class Endpoint:
    """Where a chat model is served. The key itself is no field: it is read where it is used."""

    base_url: str
    model: str
    api_key_env: str | None = None
    timeout: float = 60.0
    """Seconds for one reply, from the first byte sent to the last one received."""
    retries: int = 5
    backoff: float = 1.0
    """Seconds before the second retry, doubled for each further one (the first comes at once)."""

    def chat(self, messages: list[dict[str, str]], max_tokens: int = 512) -> str:
        """The reply to a conversation at temperature 0.

        Connection errors, 429 and 5xx are tried again with backoff, `Retry-After` is obeyed up to a minute.

        Raises:
            Fault: there is no reply, or it is not a chat completion with a text.
            UserError: the environment has no key under the configured name.
        """
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        with requests.Session() as session:
            session.auth = _Bearer(self._key())
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=self._retry()))
            try:
                return self._content(self._post(session, body))
            except (requests.RequestException, HTTPError, OSError) as error:
                raise Fault("timeout" if _timed_out(error) else "connection") from None

    def _post(self, session: requests.Session, body: dict[str, Any]) -> bytes:
        """The body of a 200, read piecewise so that neither its length nor its slowness is unlimited."""
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        deadline = time.monotonic() + self.timeout
        with session.post(
            url, json=body, timeout=self.timeout, stream=True, allow_redirects=False
        ) as response:
            if response.status_code != 200:
                raise Fault(f"http_{response.status_code}")
            content = bytearray()
            while piece := response.raw.read1(1 << 16, decode_content=True):
                content += piece
                if time.monotonic() > deadline:
                    raise Fault("timeout")
                if len(content) > MAX_REPLY_BYTES:
                    raise Fault("too_long")
            return bytes(content)

    @staticmethod
    def _content(reply: bytes) -> str:
        if not reply:
            raise Fault("empty")
        try:
            content = json.loads(reply)["choices"][0]["message"]["content"]
        except (ValueError, RecursionError):
            raise Fault("not_json") from None
        except (KeyError, IndexError, TypeError):
            raise Fault("no_choice") from None
        if content is None or (isinstance(content, str) and not content.strip()):
            raise Fault("empty")
        if not isinstance(content, str):
            raise Fault("no_text")
        return content

    def _retry(self) -> Retry:
        return _PatientRetry(
            total=self.retries,
            status_forcelist=RETRIED,
            allowed_methods=None,  # a POST too: asking for a verdict twice changes nothing
            backoff_factor=self.backoff,
            backoff_max=MAX_BACKOFF_SECONDS,
            raise_on_status=False,
        )

    def _key(self) -> str | None:
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env)
        if not key:
            raise UserError(
                f"evaluate.judge_api_key_env: the environment variable {self.api_key_env} is not set here; "
                "it must be set on the nodes before Ray starts there"
            )
        return key


def _timed_out(error: Exception) -> bool:
    """Also behind the retries, after which requests calls everything a ConnectionError."""
    last = getattr(error.args[0], "reason", None) if error.args else None
    return any(isinstance(found, (requests.Timeout, ReadTimeoutError)) for found in (error, last))


class _PatientRetry(Retry):
    """Obeys `Retry-After`, but not for hours."""

    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        asked = super().get_retry_after(response)
        return None if asked is None else min(asked, MAX_BACKOFF_SECONDS)


class _Bearer(requests.auth.AuthBase):
    """Sets the header itself: requests would let a `.netrc` replace one that is among the headers."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request
