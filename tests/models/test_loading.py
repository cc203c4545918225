"""What a model folder's content is called, and that it is read no more often than it must be."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import Gemma3TextConfig, LlamaConfig

from bdpo.config import parse_config
from bdpo.errors import UserError
from bdpo.models import loading as models
from bdpo.models.loading import require_positions, weights_digest
from bdpo.storage.cache import cache_folder

SIZE = 4 * 2**20


def bytes_read():
    """By this process, of whatever file: the kernel's own count."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with weights that were written an hour ago."""
    monkeypatch.setenv("BDPO_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write(folder / "model.safetensors", b"a")
    return folder


def write(file, byte, hours_ago=1):
    file.write_bytes(byte * SIZE)
    then = file.stat().st_mtime - 3600 * hours_ago
    os.utime(file, (then, then))


def digest_and_bytes(folder):
    before = bytes_read()
    return weights_digest(folder), bytes_read() - before


def test_weights_are_read_once_and_again_when_they_change(folder):
    file = folder / "model.safetensors"
    first, read = digest_and_bytes(folder)
    assert read >= SIZE
    again, read = digest_and_bytes(folder)
    assert again == first
    assert read < SIZE / 100
    kept = file.stat()
    with file.open("r+b") as stream:  # the same size, file and time: only its time of change tells
        stream.write(b"b")
    os.utime(file, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    changed, read = digest_and_bytes(folder)
    assert changed != first
    assert read >= SIZE


def test_code_that_a_model_brings_is_part_of_it(folder):
    without = weights_digest(folder)
    (folder / "modeling_own.py").write_text("scale = 1")
    first = weights_digest(folder)
    (folder / "modeling_own.py").write_text("scale = 2")
    assert len({without, first, weights_digest(folder)}) == 3


def test_what_is_kept_is_the_digest_of_the_content_wherever_it_lies(folder, tmp_path):
    first = weights_digest(folder)
    folder.rename(tmp_path / "elsewhere")
    assert weights_digest(tmp_path / "elsewhere") == first == weights_digest(tmp_path / "elsewhere")
    (kept, _) = sorted((cache_folder() / "digests").iterdir())
    assert kept.read_text().split()[1] == hashlib.sha256(b"a" * SIZE).hexdigest()


def test_weights_that_changed_just_now_are_not_kept(folder):
    """They could change again at what the clock of the file system calls the same time."""
    write(folder / "model.safetensors", b"b", hours_ago=0)
    weights_digest(folder)
    assert not (cache_folder() / "digests").exists()


def test_processes_that_begin_together_read_once(folder):
    read = bytes_read()
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(weights_digest, [folder] * 4))) == 1
    assert bytes_read() - read < 1.5 * SIZE


def test_a_cache_that_cannot_be_used_is_done_without(folder, monkeypatch, tmp_path):
    first = weights_digest(folder)
    monkeypatch.setenv("BDPO_CACHE", str(folder / "config.json"))
    assert weights_digest(folder) == first
    monkeypatch.setenv("BDPO_CACHE", str(tmp_path / "cache"))
    for kept in (cache_folder() / "digests").iterdir():
        kept.write_text("half")
    assert weights_digest(folder) == first


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}

PLAIN = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("shape", "positions"),
    [
        (LlamaConfig(max_position_embeddings=64), 64),
        (LlamaConfig(max_position_embeddings=64, rope_parameters=DYNAMIC), 64),
        (
            LlamaConfig(
                max_position_embeddings=256,
                rope_parameters=DYNAMIC | {"original_max_position_embeddings": 64},
            ),
            64,
        ),
        (
            Gemma3TextConfig(
                max_position_embeddings=64,
                rope_parameters={"full_attention": DYNAMIC, "sliding_attention": PLAIN},
            ),
            64,
        ),
    ],
)
def test_a_sequence_that_is_too_long_for_the_model_is_refused(monkeypatch, shape, positions):
    """Also one that would give the positions of all rows beside it another meaning."""
    monkeypatch.setattr(models, "model_config", lambda model: shape)

    def of_length(length):
        data = {"path": "p", "max_length": length, "max_prompt_length": 8}
        return parse_config({"run_dir": "r", "model": {"name_or_path": "m"}, "data": data}, "test")

    require_positions(of_length(positions))
    with pytest.raises(UserError, match=rf"data.max_length={positions + 1}: m has no more than {positions}"):
        require_positions(of_length(positions + 1))
