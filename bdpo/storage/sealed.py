"""JSON objects that carry a digest of their own content, so that a changed byte is noticed on reading.

Everything that a later command decides by is written so: manifests, the parts of checkpoints, the lines of
logs. The digest protects against damage (a flipped bit, a cut file, an edit by hand), not against somebody
who computes it anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bdpo.storage.digests import json_digest

DIGEST = "digest"


def sealed(content: Mapping[str, Any], **layout: Any) -> str:
    """The JSON text of the content with its digest under the key `digest`; `layout` as for `json.dumps`.

    The digest is that of the canonical JSON of what a reader gets back, so tuples and lists are the same.
    """
    read_back: dict[str, Any] = json.loads(json.dumps(dict(content)))
    return json.dumps({**read_back, DIGEST: json_digest(read_back)}, **layout)


def unsealed(text: str | bytes) -> dict[str, Any]:
    """The content of a sealed JSON object, without its digest.

    Raises:
        ValueError: the text is not a sealed JSON object, or its content was changed.
    """
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.pop(DIGEST, None) != json_digest(content):
        raise ValueError("not a JSON object with a digest of its content")
    return content
