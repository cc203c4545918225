"""A bucket that never answers, whatever way, ends every request within its limit, in one line."""

from __future__ import annotations

import asyncio
import pickle
import time

import pytest
from fsspec.asyn import sync

from bdpo.errors import StorageUnavailable, UserError
from bdpo.storage.cache import cached_copy
from bdpo.storage.lease import lock
from bdpo.storage.limits import VARIABLE, storage_options, storage_seconds
from bdpo.storage.paths import read_bytes, sorted_glob, storage_path, write_bytes
from bdpo.storage.run_dir import RunDir
from tests.support.bad_servers import bad_server
from tests.support.helpers import tiny_config
from tests.support.s3_server import SECRET, new_filesystems

SECONDS = 0.3

SLACK = 60.0  # of a busy machine; without limits of our own the libraries wait for minutes
"""Seconds that a busy machine may take beside the limit."""

OPERATIONS = {
    "read": read_bytes,
    "write": lambda file: write_bytes(file, b"x"),
    "stream": lambda file: file.fs.open(file.path, "rb", cache_type="none").read(),
    "exists": lambda file: file.exists(),
    "is_file": lambda file: file.is_file(),
    "is_dir": lambda file: file.is_dir(),
    "list": lambda file: sorted_glob(file.parent, "*"),
    "remove": lambda file: file.unlink(missing_ok=True),
    "lock": lock,
}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setenv(VARIABLE, str(SECONDS))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "planted-access-key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with new_filesystems():
        yield


@pytest.mark.parametrize(
    ("way", "name"),
    [("silent", name) for name in OPERATIONS]
    + [(way, "read") for way in ("trickling header", "refusing", "unavailable")],
)
def test_every_request_ends_within_its_limit(monkeypatch, way, name):
    with bad_server(way) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server)
        file, begun = storage_path("s3://bucket/run/file.json", "x"), time.monotonic()
        with pytest.raises(StorageUnavailable) as error:
            OPERATIONS[name](file)
    assert time.monotonic() - begun < SECONDS + SLACK
    message = str(error.value)
    assert message.startswith(f"s3://bucket at {server}: no complete answer within {SECONDS:g} s")
    assert "the same command resumes" in message
    assert "\n" not in message
    assert SECRET not in message


@pytest.mark.parametrize("name", ["read", "stream"])
def test_a_body_that_trickles_ends_too(monkeypatch, name):
    with bad_server("trickling body") as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        begun = time.monotonic()
        with pytest.raises(StorageUnavailable, match="no complete answer"):
            OPERATIONS[name](storage_path("s3://bucket/run/file.json", "x"))
        assert SECONDS < time.monotonic() - begun < SECONDS + SLACK


def test_an_upload_that_nobody_reads_ends_too(monkeypatch):
    """Libraries have no limit for sending: the peer's full buffers stop it for ever."""
    with bad_server("not reading") as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setattr("bdpo.storage.s3.SLOWEST", 2**25)
        begun = time.monotonic()
        with pytest.raises(StorageUnavailable):
            write_bytes(storage_path("s3://bucket/run/file", "x"), bytes(20 * 2**20))
        assert time.monotonic() - begun < SECONDS + 20 / 32 + SLACK


def test_what_the_server_says_last_is_in_the_line(monkeypatch):
    monkeypatch.setenv(VARIABLE, "5")
    for way, said in {"refusing": "Could not connect", "unavailable": "Service Unavailable"}.items():
        with bad_server(way) as url:
            monkeypatch.setenv("AWS_ENDPOINT_URL", url)
            with new_filesystems(), pytest.raises(StorageUnavailable, match=f"the last error: .*{said}"):
                read_bytes(storage_path("s3://bucket/run/file.json", "x"))


def test_commands_report_it_as_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(
        UserError, match=r"^run_dir=s3://bucket/run: cannot be .* no complete answer"
    ) as error:
        RunDir("s3://bucket/run").open(tiny_config("s3://bucket/run", tmp_path, tmp_path))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"^model=s3://bucket/model: cannot be read .* no complete answer"):
        cached_copy("s3://bucket/model", "model")


def test_a_bucket_that_answers_again_is_no_failure(bucket, tmp_path, monkeypatch):
    """Two answers 503, then the true one: the caller never sees them."""
    from bdpo.storage import s3

    file = storage_path(f"{bucket}/{tmp_path.name}", "x")
    true, calls = s3.S3FileSystem._call_s3, []

    async def at_first_unavailable(self, method, *arguments, **request):
        calls.append(method)
        if len(calls) < 3:
            raise s3.HTTPClientError(error="closed")
        return await true(self, method, *arguments, **request)

    monkeypatch.setattr(s3.S3FileSystem, "_call_s3", at_first_unavailable)
    monkeypatch.setenv(VARIABLE, "20")
    with new_filesystems():
        write_bytes(file, b"here")
        assert calls == ["put_object"] * 3
        assert read_bytes(file) == b"here"


def test_the_limit_of_a_request_begins_when_its_client_is_there(bucket, monkeypatch):
    """Not before: botocore reads its tables for the first client, for seconds on a busy machine."""
    from bdpo.storage import s3

    build = s3.S3FileSystem.set_session

    async def build_slowly(self, *arguments, **options):
        if self._s3 is None:
            await asyncio.sleep(2 * SECONDS)
        return await build(self, *arguments, **options)

    async def answer_at_once(self, method, *arguments, **request):
        await self.set_session()
        return {"Contents": []}

    monkeypatch.setattr(s3.S3FileSystem, "set_session", build_slowly)
    monkeypatch.setattr(s3.S3FileSystem, "_call_s3", answer_at_once)
    filesystem = storage_path(bucket, "x").fs
    answer = sync(filesystem.loop, filesystem._call_s3, "list_objects_v2", Bucket="bucket")
    assert answer == {"Contents": []}


def test_another_process_has_the_limits_too(monkeypatch):
    path = storage_path("s3://bucket/run", "x")
    again = pickle.loads(pickle.dumps(path))
    filesystem = pickle.loads(pickle.dumps(path.fs))
    assert type(again.fs).__name__ == type(filesystem).__name__ == "LimitedS3FileSystem"
    assert again.fs.limit == SECONDS


def test_a_web_page_that_never_answers(monkeypatch):
    monkeypatch.setenv(VARIABLE, "0.5")
    with bad_server("silent") as url:
        begun = time.monotonic()
        with pytest.raises(UserError, match=r"^data\.path=http.*cannot be read"):
            cached_copy(f"{url}/pairs.jsonl", "data.path")
        assert time.monotonic() - begun < SLACK


@pytest.mark.parametrize("given", ["-1", "0", "soon", "inf", "nan"])
def test_a_limit_that_is_none_is_refused(monkeypatch, given):
    monkeypatch.setenv(VARIABLE, given)
    with pytest.raises(UserError, match=f"^{VARIABLE}={given}: expects"):
        storage_seconds()


def test_every_protocol_gets_its_limit(monkeypatch):
    """The options are those of gcsfs 2026.10 and adlfs 2026.8: each attempt has its share of the limit."""
    monkeypatch.setenv(VARIABLE, "90")
    for protocol, attempts in (("gs", 6), ("gcs", 6), ("https", 1), ("http", 1)):
        options = storage_options(protocol)
        timeout = options.get("requests_timeout") or options["client_kwargs"]["timeout"]
        assert timeout.sock_connect == timeout.sock_read == 90 / attempts
        assert timeout.total == 60 * 90  # a large file takes longer than any request
    for protocol in ("az", "abfs", "abfss"):
        options = storage_options(protocol)
        assert options["connection_timeout"] == options["read_timeout"] == 23  # whole seconds
        assert isinstance(options["read_timeout"], int)
    for protocol in ("gs", "az", "https", "memory"):
        assert storage_options(protocol)["use_listings_cache"] is False
    assert storage_options("memory") == {"use_listings_cache": False}
    assert pickle.loads(pickle.dumps(storage_options("gs"))) == storage_options("gs")
