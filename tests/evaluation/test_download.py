from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bdpo.errors import UserError
from bdpo.evaluation.benchmarks.download import pinned_file

CONTENT = b"category,source,forbidden_prompt\nknots,x,Tie it\n"

DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """(URL, the file behind it) of a real server, and a cache of the test's own."""
    monkeypatch.setenv("BDPO_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "www" / "prompts.csv"
    file.parent.mkdir()
    file.write_bytes(CONTENT)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(file.parent)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/prompts.csv", file
    server.shutdown()
    server.server_close()


def test_a_url_is_fetched_once_and_checked(served: tuple[str, Path]) -> None:
    url, file = served
    assert pinned_file(url, DIGEST).read_bytes() == CONTENT
    file.unlink()
    assert pinned_file(url, DIGEST).read_bytes() == CONTENT  # from the cache


def test_other_content_is_refused_and_not_kept(served: tuple[str, Path]) -> None:
    url, file = served
    file.write_bytes(CONTENT + b"knots,x,Another\n")
    with pytest.raises(UserError, match=f"has sha256 .*, expects {DIGEST}"):
        pinned_file(url, DIGEST)
    file.write_bytes(CONTENT)
    assert pinned_file(url, DIGEST).read_bytes() == CONTENT


def test_a_url_expects_its_digest_and_must_be_there(served: tuple[str, Path]) -> None:
    url, _ = served
    with pytest.raises(UserError, match="expects the sha256"):
        pinned_file(url, None)
    with pytest.raises(UserError, match="cannot be read"):
        pinned_file(f"{url}.gone", DIGEST)
    with pytest.raises(UserError, match="cannot be read"):
        pinned_file("nonsense://x/y.csv", DIGEST)


def test_a_local_file_is_itself_and_checked_if_pinned(served: tuple[str, Path]) -> None:
    _, file = served
    assert pinned_file(str(file), None) == file
    assert pinned_file(str(file), DIGEST) == file
    with pytest.raises(UserError, match="has sha256"):
        pinned_file(str(file), "0" * 64)
