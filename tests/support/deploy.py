"""What the tests of the cluster files share."""

from __future__ import annotations

import shlex

from bdpo.config import load_config
from tests.support import ROOT


def configs_of(commands):
    """The config of every command line with `--config`, as the command would read it, overrides and all."""
    found = []
    for line in commands.replace("\\\n", " ").replace('"', " ").splitlines():
        words = shlex.split(line, comments=True)
        if "--config" in words:
            file, *rest = words[words.index("--config") + 1 :]
            found.append(load_config(ROOT / file, [word for word in rest if not word.startswith("--")]))
    return found


def pinned(image):
    """A pattern of this image by its digest, or with the placeholder that Docker refuses to read."""
    return image + r"@sha256:([0-9a-f]{64}|DIGEST)"
