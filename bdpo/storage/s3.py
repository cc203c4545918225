"""S3 through s3fs, with a time limit on every request: a dead, silent or slow bucket ends in one line.

s3fs and botocore limit the number of attempts and the silence between two bytes. Together that was seven
minutes for a silent server and no limit for one that sends a byte now and then. Here the time is the limit:
a request is tried again until `BDPO_STORAGE_SECONDS` have passed, see `bdpo.storage.limits`.
"""

from __future__ import annotations

import asyncio
import random
from itertools import count
from typing import Any

from botocore.exceptions import ClientError, ConnectionError, HTTPClientError
from s3fs import S3FileSystem

from bdpo.errors import StorageUnavailable, first_line
from bdpo.storage.limits import AT_ONCE, SLOWEST, VARIABLE, storage_seconds

_ATTEMPTS = 4  # a silent server is asked so often within the limit

_PAUSE = 0.2  # seconds between the first two attempts, then twice as long each, up to `_LONGEST_PAUSE`
_LONGEST_PAUSE = 5.0

_MAY_PASS = (408, 429)  # of the answers below 500


class LimitedS3FileSystem(S3FileSystem):
    """The filesystem of `s3://` URLs; `StorageUnavailable` is raised when a request exceeds its limit.

    A limit is `storage_seconds()`, and what a request sends or receives divided by `SLOWEST` on top of that.
    """

    retries = _ATTEMPTS

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.limit = storage_seconds()
        self.connect_timeout = self.read_timeout = self.limit / _ATTEMPTS
        # `_call_s3` tries again; without a connection for each of the requests at a time some would wait
        once = {"retries": {"mode": "standard", "total_max_attempts": 1}, "max_pool_connections": AT_ONCE}
        options["config_kwargs"] = {**once, **(options.get("config_kwargs") or {})}
        super().__init__(*arguments, **options)

    async def _call_s3(self, method: str, *arguments: Any, **request: Any) -> Any:
        """One request of S3's API, tried again while errors are those that may pass.

        Raises:
            StorageUnavailable: the limit has passed without an answer.
        """
        await self.set_session()  # it takes a second on a busy machine, which is not the endpoint's
        loop, sent = asyncio.get_running_loop(), request.get("Body")
        end = loop.time() + self.limit + (len(sent) if isinstance(sent, bytes) else 0) / SLOWEST
        last: Exception | None = None
        for attempt in count():
            try:
                async with asyncio.timeout_at(end) as timeout:
                    answer = await super()._call_s3(method, *arguments, **request)
                break
            except Exception as error:
                if timeout.expired():
                    raise self._unavailable(request, last) from None
                if not _may_pass(error):
                    raise
                last = error
            pause = min(_PAUSE * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1)  # noqa: S311
            if loop.time() + pause > end:
                raise self._unavailable(request, last)
            await asyncio.sleep(pause)
        if "ContentLength" in answer and "Body" in answer:
            end = loop.time() + self.limit + answer["ContentLength"] / SLOWEST
            answer["Body"] = _LimitedBody(answer["Body"], end, self._unavailable(request, None))
        return answer

    async def _cat_file(self, path: str, **options: Any) -> bytes:
        """The content of an object in one request: s3fs would ask for its size first, to cut large ones."""
        content: bytes = await super()._cat_file(path, **{"max_concurrency": 1, **options})
        return content

    async def _isfile(self, path: str) -> bool:
        """Whether there is such an object. fsspec's own takes every error, a silent server's too, for no."""
        try:
            return bool((await self._info(path))["type"] == "file")
        except FileNotFoundError:
            return False

    def _unavailable(self, request: dict[str, Any], last: Exception | None) -> StorageUnavailable:
        address = self._s3.meta.endpoint_url if self._s3 else self.endpoint_url or "the endpoint"
        bucket = request.get("Bucket", "")
        why = "" if last is None else f", the last error: {first_line(last)}"
        return StorageUnavailable(
            f"s3://{bucket} at {address}: no complete answer within {self.limit:g} s{why}; "
            "check the endpoint, the network and the credentials; when it answers the same command resumes "
            f"({VARIABLE} sets the limit)"
        )


class _LimitedBody:
    """The body of an answer, which has to be read before `end` (in the time of the event loop)."""

    def __init__(self, body: Any, end: float, unavailable: StorageUnavailable) -> None:
        self._body, self._end, self._unavailable = body, end, unavailable

    async def read(self, *amount: int) -> Any:
        """The next bytes; errors of the connection are those of s3fs, which asks again."""
        try:
            async with asyncio.timeout_at(self._end) as timeout:
                return await self._body.read(*amount)
        except Exception:
            if timeout.expired():
                raise self._unavailable from None
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: no connection, no answer, or the server's own fault."""
    cause = error.__cause__ if isinstance(error.__cause__, ClientError) else error
    if isinstance(cause, ClientError):
        status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status in _MAY_PASS
    return isinstance(error, (HTTPClientError, ConnectionError, TimeoutError))
