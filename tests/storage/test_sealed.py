"""A sealed JSON object is read back as it was written, or not at all."""

from __future__ import annotations

import random

import pytest

from bdpo.storage.sealed import sealed, unsealed

CONTENT = {"step": 3, "metrics": {"loss": 0.1, "ü": None}, "rungs": (0.5, 1.0), "counts": {3: 4}}


def test_content_is_read_back_as_json_keeps_it():
    assert unsealed(sealed(CONTENT)) == {
        "step": 3, "metrics": {"loss": 0.1, "ü": None}, "rungs": [0.5, 1.0], "counts": {"3": 4},
    }  # fmt: skip


def test_layout_does_not_count():
    assert unsealed(sealed(CONTENT, indent=2, sort_keys=True))["step"] == 3


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"step": 3}', '{"step": 3, "digest": null}', b"\xff"])
def test_what_is_not_sealed_is_refused(text):
    with pytest.raises(ValueError, match="not a JSON object with a digest"):
        unsealed(text)


def test_no_flipped_byte_changes_what_is_read():
    text, rng = sealed(CONTENT).encode(), random.Random(0)
    refused = 0
    for _ in range(1000):
        damaged = bytearray(text)
        damaged[rng.randrange(len(text))] ^= rng.randrange(1, 256)
        try:
            assert unsealed(bytes(damaged)) == unsealed(text)  # only white space changed
        except ValueError:
            refused += 1
    assert refused > 950
