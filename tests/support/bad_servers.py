"""HTTP servers on loopback that never give an answer, each in its own way."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"

HEAD = b"\r\n".join(
    [
        b"HTTP/1.1 200 OK",
        b"Content-Length: 5000",
        b'ETag: "x"',
        b"Last-Modified: Sun, 01 Jan 2023 00:00:00 GMT",
        b"\r\n",
    ]
)

BREATH = 0.05
"""Seconds between two bytes of a server that trickles."""


def _silent(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


def _trickling_header(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    _trickle(connection)


def _trickling_body(connection: socket.socket) -> None:
    while request := connection.recv(65536):
        connection.sendall(HEAD)
        if not request.startswith(b"HEAD"):
            _trickle(connection)


def _unavailable(connection: socket.socket) -> None:
    while connection.recv(65536):
        connection.sendall(UNAVAILABLE)


def _not_reading(connection: socket.socket) -> None:
    time.sleep(60)


def _trickle(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"x")
        time.sleep(BREATH)


WAYS = {
    "silent": _silent,
    "trickling header": _trickling_header,
    "trickling body": _trickling_body,
    "unavailable": _unavailable,
    "not reading": _not_reading,
}


@contextmanager
def bad_server(way: str) -> Iterator[str]:
    """A server of one of `WAYS`, or "refusing"; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        if way == "refusing":
            listening.close()
            yield url
            return

        def serve(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                WAYS[way](connection)

        def accept() -> None:
            with suppress(OSError):  # closed: the test is over
                while True:
                    connection, _ = listening.accept()
                    threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield url
        with suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
