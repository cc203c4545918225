"""A headless Chromium that shows a page as it would be on a phone, in the dark or on paper, and answers.

It is spoken to in its DevTools protocol over two pipes: JSON messages that end in a null byte.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium")

OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]


class Tab:
    """The one tab of a browser."""

    session: str | None = None

    def __init__(self, send: int, receive: int) -> None:
        self.send, self.receive, self.calls = os.fdopen(send, "wb", 0), os.fdopen(receive, "rb"), 0
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """What the browser answers; its other messages are left out."""
        self.calls += 1
        message = {"id": self.calls, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        self.send.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._message())
            if answer.get("id") == self.calls:
                assert "error" not in answer, (method, answer)
                result: dict[str, Any] = answer["result"]
                return result

    def _message(self) -> bytes:
        read = bytearray()
        while (byte := self.receive.read(1)) != b"\0":
            assert byte, "the browser is gone"
            read += byte
        return bytes(read)

    def show(self, file: Path, width: int, scheme: str = "light", media: str = "screen") -> None:
        """Open a file in a window of this width; `scheme` is light or dark, `media` screen or print."""
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=1200, deviceScaleFactor=1, mobile=False
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", media=media, features=features)
        self.ask("Page.navigate", url=file.as_uri())
        loaded = "new Promise(go => document.readyState == 'complete' ? go(1) : addEventListener('load', go))"
        while self.value("location.href") != file.as_uri():
            pass
        self.ask("Runtime.evaluate", expression=loaded, awaitPromise=True)

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression."""
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def pixels(self) -> np.ndarray:
        """What is to be seen of the page, (height, width, 3), 0 is black and 255 is white."""
        drawn = base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])
        return np.asarray(Image.open(io.BytesIO(drawn)).convert("RGB"))

    def assert_fits_a_phone(self, file: Path) -> None:
        """In a window of 390 pixels nothing is to be found on the right of it."""
        self.show(file, 390)
        assert self.value("innerWidth") == 390
        assert self.pixels().shape[1] == 390
        assert self.value("document.documentElement.scrollWidth") <= 390
        assert self.value("document.documentElement.scrollHeight") > 400


@contextmanager
def browser() -> Iterator[Tab]:
    """A browser of its own; without Chromium the test is skipped, but in CI it fails."""
    if CHROMIUM is None:
        assert "CI" not in os.environ, "the test of the page requires a browser"
        warnings.warn("NO CHROMIUM: the page was not looked at in a browser", stacklevel=2)
        pytest.skip("NO CHROMIUM: `apt-get install chromium` to have the page tested in a browser")
    their_ears, our_mouth = os.pipe()
    our_ears, their_mouth = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}"]
        redirected = f'exec "$@" 3<&{their_ears} 4>&{their_mouth}'  # Chromium reads 3 and writes 4
        process = subprocess.Popen(
            ["bash", "-c", redirected, "bash", *command],
            pass_fds=(their_ears, their_mouth),
            stderr=subprocess.DEVNULL,
        )
        os.close(their_ears)
        os.close(their_mouth)
        try:
            yield Tab(our_mouth, our_ears)
        finally:
            process.kill()
            process.wait()
