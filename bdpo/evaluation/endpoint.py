"""One chat completion from an OpenAI-compatible endpoint, or the reason why there is none.

Works with OpenAI, vLLM, llama.cpp and others that have `POST <base_url>/chat/completions`. Whatever goes
wrong becomes an `EndpointError` with a short code: neither what was sent nor what came back is ever in a
message. Streaming, tools and several choices are left out.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from bdpo.config.endpoint import EndpointConfig
from bdpo.errors import UserError
from bdpo.evaluation.thoughts import without_thoughts
from bdpo.storage import strict_json
from bdpo.storage.strict_json import RepeatedKey

if TYPE_CHECKING:
    import httpx

MAX_REPLY_BYTES = 1 << 20

MAX_BACKOFF_SECONDS = 60.0

RETRIED = ("connection", "http_429", "http_500", "http_502", "http_503", "http_504")
"""Errors that may pass. A timeout is not among them: it has waited long enough."""

_USABLE = ("empty", "content_filter", "refusal")
"""Errors of a chat completion that there is: some models think longer than the few tokens of a first try."""

_UNUSABLE = {
    "connection": "no answer here",
    "timeout": "no answer here",
    "http_401": "the key is not accepted; see api_key_env",
    "http_403": "the key is not accepted; see api_key_env",
    "http_404": "nothing is served under this path, or no model {model}; see base_url and model",
}


class EndpointError(Exception):
    """No usable reply; `code` is the reason: `timeout`, `connection`, `http_401`, `empty`, `not_json`, ..."""

    def __init__(self, code: str, retry_after: float | None = None) -> None:
        super().__init__(code)
        self.code = code
        self.retry_after = retry_after
        """Seconds that the server asked to wait."""


@dataclass(frozen=True)
class Endpoint:
    """Where a chat model is served. The key itself is no field: it is read where it is used."""

    base_url: str
    model: str
    section: str
    """The section of the config that names it, for messages about its keys: `evaluate.judge`."""
    api_key_env: str | None = None
    timeout: float = 60.0
    """Seconds for one reply, from the first byte sent to the last one received, however these trickle."""
    retries: int = 5
    backoff: float = 1.0
    """Seconds before the second retry, doubled for each further one (the first comes at once)."""
    temperature: float = 0.0

    @classmethod
    def of(cls, config: EndpointConfig, section: str, temperature: float = 0.0) -> Endpoint:
        """The endpoint that `section` of the config names."""
        return cls(
            config.base_url,
            config.model,
            section,
            config.api_key_env,
            config.timeout,
            config.retries,
            temperature=temperature,
        )

    @property
    def longest(self) -> float:
        """Seconds that one reply may take, with all its retries and the waits between them."""
        return (self.retries + 1) * self.timeout + self.retries * MAX_BACKOFF_SECONDS

    def chat(self, messages: list[dict[str, str]], max_tokens: int = 512, response_format: Any = None) -> str:
        """The reply to a conversation, in `response_format` if one is given.

        Connection errors, 429 and 5xx are tried again with backoff, `Retry-After` is obeyed up to a minute.

        Raises:
            EndpointError: there is no reply, or it is not a chat completion with a text.
            UserError: the environment has no key under the configured name.
        """
        body: dict[str, Any] = {"model": self.model, "messages": messages}
        body |= {"temperature": self.temperature, "max_tokens": max_tokens}
        body |= {} if response_format is None else {"response_format": response_format}
        headers = self._headers()
        for attempt in range(self.retries + 1):
            try:
                return reply_text(self._once("POST", "chat/completions", headers, body))
            except EndpointError as error:
                if error.code not in RETRIED or attempt == self.retries:
                    raise
                waited = self.backoff * 2**attempt if attempt else 0.0
                waited = waited if error.retry_after is None else error.retry_after
                time.sleep(min(waited, MAX_BACKOFF_SECONDS))
        raise AssertionError("the last attempt returns or raises")

    def require_usable(self) -> None:
        """Make sure, by a chat of a few words, that the endpoint takes the key and has the model.

        Raises:
            UserError: it does not, whatever was tried; the message has the reason and the key to look at.
        """
        once_more = replace(self, retries=min(self.retries, 1))  # a user waits for this
        try:
            once_more.chat([{"role": "user", "content": "Reply with the word yes."}], max_tokens=16)
        except EndpointError as error:
            if error.code in _USABLE:
                return
            reason = _UNUSABLE.get(error.code, "no chat completion from {model}").format(model=self.model)
            raise UserError(f"{self.section}.base_url={self.base_url}: {reason} ({error.code})") from None

    def _once(
        self, method: str, path: str, headers: dict[str, str], body: dict[str, Any] | None = None
    ) -> bytes:
        """The body of a 200. A clock of its own ends whatever the server does: headers that trickle,
        `100 Continue`, chunks of nothing."""
        import httpx  # status needs no HTTP

        url = f"{self.base_url.rstrip('/')}/{path}"
        loop = asyncio.new_event_loop()
        try:
            request = httpx.Request(method, url, headers=headers, json=body)
            return loop.run_until_complete(asyncio.wait_for(_read(request), self.timeout))
        except (TimeoutError, httpx.TimeoutException):
            raise EndpointError("timeout") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError):
            raise EndpointError("connection") from None
        finally:
            with suppress(TimeoutError):  # what was being read when the clock ended it
                loop.run_until_complete(asyncio.wait_for(loop.shutdown_asyncgens(), 1.0))
            loop.close()  # and no asyncio.run, which waits for the thread of a name that is still resolved

    def _headers(self) -> dict[str, str]:
        if self.api_key_env is None:
            return {}
        key = os.environ.get(self.api_key_env, "").strip()  # a file with CRLF ends leaves its mark
        if not key:
            raise UserError(
                f"{self.section}.api_key_env: the environment variable {self.api_key_env} is not set here; "
                "it must be set on the nodes before Ray starts there"
            )
        if not (key.isascii() and key.isprintable()):
            raise UserError(
                f"{self.section}.api_key_env: {self.api_key_env} holds characters that no header may have"
            )
        return {"Authorization": f"Bearer {key}"}


async def _read(request: httpx.Request) -> bytes:
    """The body of a 200, read piecewise so that its length is not unlimited; a compressed one is refused, for
    a kilobyte of it can be a gigabyte."""
    import httpx

    request.headers["Accept-Encoding"] = "identity"
    # The clock around this call is the only one: httpx's own start anew with each byte.
    async with httpx.AsyncClient(verify=_certificates(), timeout=None) as client:  # noqa: S113
        response = await client.send(request, stream=True)
        try:
            if response.status_code != 200:
                raise EndpointError(
                    f"http_{response.status_code}", retry_after(response.headers.get("Retry-After"))
                )
            if response.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
                raise EndpointError("compressed")
            content = bytearray()
            async for piece in response.aiter_raw():
                content += piece
                if len(content) > MAX_REPLY_BYTES:
                    raise EndpointError("too_long")
            return bytes(content)
        finally:
            await response.aclose()


@cache
def _certificates() -> ssl.SSLContext:
    """Read once: it takes longer than a request."""
    import httpx

    return httpx.create_ssl_context()


def retry_after(header: str | None) -> float | None:
    """The seconds that a `Retry-After` header asks for, at most a minute; None if it makes no sense."""
    if header is None:
        return None
    try:
        seconds = float(header) if header.strip().isdigit() else _seconds_until(header)
    except (ValueError, OverflowError, TypeError):
        return None
    return min(max(seconds, 0.0), MAX_BACKOFF_SECONDS)


def _seconds_until(date: str) -> float:
    return parsedate_to_datetime(date).timestamp() - time.time()


def reply_text(reply: bytes) -> str:
    """The text of a chat completion.

    Raises:
        EndpointError: it is none, the server calls it an error, it was cut short by a filter, it is a refusal
            or the call of a tool, or it contradicts itself.
    """
    if not reply:
        raise EndpointError("empty")
    try:
        found = strict_json.loads(reply)
        choices = found["choices"]
        if found.get("error") or choices[0].get("error"):
            raise EndpointError("error")
        if len(choices) > 1 and any(choice != choices[0] | {"index": choice["index"]} for choice in choices):
            raise EndpointError("conflicting_choices")
        message, finish = choices[0]["message"], choices[0].get("finish_reason")
        content, role = message["content"], message.get("role")
    except RepeatedKey:
        raise EndpointError("duplicate_key") from None
    except (ValueError, RecursionError):
        raise EndpointError("not_json") from None
    except (KeyError, IndexError, TypeError, AttributeError):
        raise EndpointError("no_choice") from None
    if role in ("user", "system", "tool") or isinstance(finish, dict | list):
        raise EndpointError("no_choice")
    if finish in ("content_filter", "error"):
        raise EndpointError(finish)
    if message.get("refusal"):
        raise EndpointError("refusal")
    if message.get("tool_calls"):
        raise EndpointError("tool_calls")
    if content is None or (isinstance(content, str) and not content.strip()):
        raise EndpointError("empty")
    if not isinstance(content, str):
        raise EndpointError("no_text")
    return content.encode(errors="replace").decode()  # JSON can spell lone surrogates, which no file can hold


def outside_of_thoughts(reply: str) -> str:
    """What a model that may think first wrote outside of its thoughts.

    Raises:
        EndpointError: `unfinished_thought` where there is nothing else.
    """
    found = without_thoughts(reply)
    if found is None:
        raise EndpointError("unfinished_thought")
    return found.strip()
