"""A folder with checksums is read as it was written, or not at all; locally and on object storage."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from bdpo.config import ModelConfig
from bdpo.errors import UserError
from bdpo.models.adapters import adapter_folder
from bdpo.models.loading import model_folder
from bdpo.storage.cache import local_copy
from bdpo.storage.checksums import CHECKSUMS, require_checksums, write_checksums
from bdpo.storage.paths import storage_path, upload

MODEL = ("config.json", "model.safetensors", "deep/er.txt")

ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "deep/er.txt")


def folder_of(folder, names):
    """A folder that passes for a model or an adapter, with its checksums."""
    (folder / "deep").mkdir(parents=True)
    for name in names:
        if name.endswith(".safetensors"):
            save_file({"weight": np.zeros(3, dtype=np.float32)}, folder / name)
        else:
            (folder / name).write_text("{}")
    write_checksums(folder)
    return folder


@pytest.fixture
def exported(tmp_path):
    return folder_of(tmp_path / "model", MODEL)


def as_model(folder):
    return model_folder(ModelConfig(name_or_path=str(folder)))


def as_adapter(folder):
    return adapter_folder(str(folder), "evaluate.adapter")


def flipped(file):
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("read", "names", "name"),
    [(read, names, name) for read, names in ((as_model, MODEL), (as_adapter, ADAPTER)) for name in names]
    + [(as_model, MODEL, CHECKSUMS), (as_adapter, ADAPTER, CHECKSUMS)],
)
def test_a_flipped_byte_is_refused_in_one_line_with_its_file(tmp_path, read, names, name):
    folder = folder_of(tmp_path / "folder", names)
    assert read(folder) == folder
    flipped(folder / name)
    with pytest.raises(UserError, match=rf"{name}: not as it was exported") as caught:
        read(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [lambda file: file.unlink(), lambda file: file.rename(f"{file}.old")])
def test_a_file_that_is_gone_is_refused(exported, change):
    change(exported / "deep" / "er.txt")
    with pytest.raises(UserError, match=r"er\.txt.*: not as it was exported"):
        require_checksums(exported)


def test_a_file_that_was_added_is_refused_unless_it_is_hidden(exported):
    (exported / ".DS_Store").write_text("")
    require_checksums(exported)
    (exported / "chat_template.jinja").write_text("other")
    with pytest.raises(UserError, match="chat_template"):
        require_checksums(exported)


def test_a_folder_of_another_origin_is_not_compared(exported):
    (exported / CHECKSUMS).unlink()
    flipped(exported / "model.safetensors")
    require_checksums(exported)


def test_a_folder_on_object_storage_is_compared_too(exported, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("BDPO_CACHE", str(tmp_path / "cache"))
    remote = storage_path(f"{bucket}/{tmp_path.name}/model", "x")
    upload(exported, remote)
    assert (as_model(remote) / CHECKSUMS).is_file()
    flipped(exported / "model.safetensors")
    (remote / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    assert local_copy(remote).is_dir()
    with pytest.raises(UserError, match=r"model\.safetensors: not as it was exported"):
        as_model(remote)
