"""A real S3 server on loopback, in a process of its own: moto's, started and ended by the test."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import fsspec

SECRET = "planted-secret-access-key"

PROGRAM = """
from moto.server import ThreadedMotoServer
import time
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
time.sleep(10**6)
"""


@contextmanager
def s3_server() -> Iterator[str]:
    """Start it; yields the URL of its API."""
    command = [sys.executable, "-c", PROGRAM]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()


@contextmanager
def new_filesystems() -> Iterator[None]:
    """Those of S3 that are used in the block are made in it, with its environment, and forgotten after it."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        yield
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@contextmanager
def s3_bucket(server: str) -> Iterator[str]:
    """A new bucket, which the environment gives access to meanwhile. Yields the bucket's URL."""
    environment = {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "planted-access-key-id",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with mock.patch.dict(os.environ, environment):
        import boto3

        name = f"bdpo-tests-{secrets.token_hex(4)}"
        boto3.client("s3").create_bucket(Bucket=name)
        with new_filesystems():
            yield f"s3://{name}"
