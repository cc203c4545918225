"""How long a request to object storage may take, for each protocol in the words of its fsspec library.

S3 has a filesystem of its own, `bdpo.storage.s3`, which keeps to the limit whatever the server does. The
other libraries have timeouts for connecting and for each silence, and make several attempts: each of them
gets its share of the limit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import fsspec

from bdpo.errors import UserError

if TYPE_CHECKING:
    from aiohttp import ClientTimeout

VARIABLE = "BDPO_STORAGE_SECONDS"
"""The environment variable that sets the limit on a node."""

STORAGE_SECONDS = 60.0
"""Seconds after which a request without an answer is given up; retries are included."""

SLOWEST = 2**18
"""Bytes per second: what a request transfers may take this long on top of the limit."""

AT_ONCE = 32
"""Requests that are on their way at one time."""

_FILES = 60  # the size of a file is not known before: it may take so many times the limit in all

_ATTEMPTS = {"gs": 6, "gcs": 6, "az": 4, "abfs": 4, "abfss": 4}
"""Retries of gcsfs (`GCSFileSystem.retries`) and of the Azure SDK (`retry_total` 3): neither can be set."""


def storage_seconds() -> float:
    """The limit of a request in seconds: `$BDPO_STORAGE_SECONDS`, else `STORAGE_SECONDS`.

    Raises:
        UserError: the variable is not a positive number.
    """
    given = os.environ.get(VARIABLE)
    if not given:
        return STORAGE_SECONDS
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UserError(f"{VARIABLE}={given}: expects a number of seconds above 0")
    return seconds


def storage_options(protocol: str) -> Mapping[str, Any]:
    """The arguments of the filesystem of a protocol: no remembered listings, and its time limits."""
    # Other processes write to a bucket too: a listing must not be remembered.
    return {"use_listings_cache": False, **_timeouts(protocol, storage_seconds())}


def _timeouts(protocol: str, seconds: float) -> Mapping[str, Any]:
    silence = seconds / _ATTEMPTS.get(protocol, 1)
    if protocol in ("http", "https"):
        return {"client_kwargs": {"timeout": _aiohttp_timeout(seconds, silence)}}
    if protocol in ("gs", "gcs"):
        # aiohttp would take a number for the limit of the complete file, and None for no limit at all.
        return {"requests_timeout": _aiohttp_timeout(seconds, silence)}
    if protocol in ("az", "abfs", "abfss"):
        return {"connection_timeout": math.ceil(silence), "read_timeout": math.ceil(silence)}
    return {}


def _aiohttp_timeout(seconds: float, silence: float) -> ClientTimeout:
    from aiohttp import ClientTimeout

    return ClientTimeout(seconds * _FILES, sock_connect=silence, sock_read=silence)


for _protocol in ("s3", "s3a"):  # a name: the library is imported by who opens such a URL
    fsspec.register_implementation(_protocol, "bdpo.storage.s3.LimitedS3FileSystem", clobber=True)
