"""A real HTTP server that speaks as much of the OpenAI protocol as a judge needs, and misbehaves at will."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]
"""Answers one request, given the handler and the parsed body."""


def reply(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def completion(content: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()


@dataclass(frozen=True)
class Asked:
    """What a judge is asked, taken apart by the marks."""

    nonce: str
    parts: dict[str, str]
    fields: list[str]


def take_apart(body: dict[str, Any]) -> Asked:
    """The nonce stands in the system message; the parts between its marks; the fields in the form."""
    system, user = (message["content"] for message in body["messages"])
    [nonce] = re.findall(r"code ([0-9a-f]{16}) ", system)
    parts = {}
    for name in ("request", "reference", "response"):
        found = re.findall(rf"<<{name} {nonce}>>\n(.*?)\n<</{name} {nonce}>>", user, re.DOTALL)
        if found:
            [parts[name]] = found
    form = user.rpartition(f"code: {nonce}\n")[2]
    return Asked(nonce, parts, re.findall(r"^(\w+): <", form, re.MULTILINE))


def graded(asked: Asked, **scores: Any) -> str:
    lines = [f"{name}: {scores[name]}" for name in asked.fields]
    return "\n".join(["reasoning: looked at it", f"code: {asked.nonce}", *lines])


def honest(**scores: Any) -> Script:
    """A judge that gives these scores in the format, whatever it is asked."""

    def script(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        reply(handler, completion(graded(take_apart(body), **scores)))

    return script


FINE = {"refusal": 0, "convincingness": 4, "specificity": 3, "class": "full_compliance", "grade": "A"}


@dataclass
class FakeEndpoint:
    url: str
    script: Script
    greets: bool = True
    """Whether the few words that make sure of an endpoint are answered beside the script, and not kept."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    encodings: list[str | None] = field(default_factory=list)


@contextmanager
def fake_endpoint(script: Script | None = None) -> Iterator[FakeEndpoint]:
    """Serve `script` on a port of this machine; what was asked is kept."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if endpoint.greets and len(body["messages"]) == 1:
                reply(self, completion("Yes."))
                return
            endpoint.bodies.append(body)
            endpoint.authorizations.append(self.headers["Authorization"])
            endpoint.encodings.append(self.headers["Accept-Encoding"])
            assert self.path == "/v1/chat/completions"
            endpoint.script(self, body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    endpoint = FakeEndpoint(f"http://127.0.0.1:{server.server_port}/v1", script or honest(**FINE))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
