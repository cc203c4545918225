"""Fixtures that several test modules share: a small tokenizer, prepared pairs, a cluster, servers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from bdpo.config import DataConfig
from bdpo.data.pairs import read_pairs
from bdpo.data.prepare import prepare
from bdpo.models.tokenizer import ChatTokenizer
from tests.support.browser import browser
from tests.support.chats import CHATML, MakeChat, byte_tokenizer
from tests.support.data_files import write_jsonl
from tests.support.evaluation import SECRETS
from tests.support.killed_training import training_inputs, training_nodes  # noqa: F401
from tests.support.ray_nodes import session_node
from tests.support.s3_server import s3_bucket, s3_server

torch.set_num_threads(1)

settings.register_profile("bdpo", deadline=None)  # no test asserts a time: machines differ
settings.load_profile("bdpo")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Path]:
    """The folder of a Ray cluster on this machine, which every command of the session joins."""
    import ray

    node = session_node(**SECRETS)  # which no command may leak
    with node as (address, folder), pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_ADDRESS", address)
        yield folder
        ray.shutdown()


@pytest.fixture
def sent_by_value(ray_session: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """Workers of the cluster are sent the classes of the test's module, which they cannot import."""
    import ray

    from pipelines.runtime.cluster import connect

    connect()
    ray.cloudpickle.register_pickle_by_value(request.module)
    yield
    ray.cloudpickle.unregister_pickle_by_value(request.module)


@pytest.fixture(scope="session")
def make_chat() -> MakeChat:
    """make_chat(template, merges=()): a byte-level tokenizer behind a chat template of one's own."""

    def make(template: str, merges: Sequence[tuple[str, str]] = ()) -> ChatTokenizer:
        tokenizer = byte_tokenizer(merges)
        tokenizer.chat_template = template
        return ChatTokenizer(tokenizer)

    return make


@pytest.fixture(scope="session")
def tiny_chat(make_chat: MakeChat) -> ChatTokenizer:
    """A ChatML tokenizer of one token a byte: 262 tokens in all."""
    return make_chat(CHATML)


@pytest.fixture
def prepare_here(tmp_path, tiny_chat):
    """prepare_here(rows or path, **config): prepare into `tmp_path/pairs`; the account comes back."""

    def prepare_source(source, seed=0, **config):
        if isinstance(source, list):
            source = write_jsonl(tmp_path / "rows.jsonl", source)
        values = {"path": source and str(source), "max_bad_fraction": 1.0, **config}
        return prepare(DataConfig(**values), tiny_chat, tmp_path / "pairs", tmp_path / "private", seed)

    return prepare_source


@pytest.fixture
def kept_pairs(tmp_path):
    return lambda: read_pairs(tmp_path / "pairs", 0, 10**9).to_pylist()


@pytest.fixture
def quarantined_rows(tmp_path):
    return lambda: [json.loads(x) for x in (tmp_path / "private" / "quarantine.jsonl").open(encoding="utf-8")]


@pytest.fixture(scope="session")
def s3():
    """The URL of a real S3 server."""
    with s3_server() as url:
        yield url


@pytest.fixture(scope="module")
def bucket(s3):
    """The URL of an empty bucket on it, to which the environment gives access."""
    with s3_bucket(s3) as url:
        yield url


@pytest.fixture(scope="session")
def tab():
    """The tab of a headless Chromium."""
    with browser() as opened:
        yield opened
