"""The memory table of every preset, as the preset is on disk."""

from __future__ import annotations

import pytest

from bdpo.config import load_config
from pipelines.runtime import plan_table as plan
from tests.support import ROOT

CONFIGS = ROOT / "pipelines" / "configs"


@pytest.mark.parametrize("preset", ["qwen2-7b", "qwen2-7b-1gpu", "mistral-7b", "vicuna-7b"])
def test_a_dry_run_prints_the_memory_table_without_hub_or_gpu(preset, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = load_config(CONFIGS / f"{preset}.yaml")
    plan.print_plan(config)  # and would raise if a GPU of gpu_memory GiB could not hold it
    shown = capsys.readouterr().out
    for row in ("billion parameters", "activations", "output head", "20,000", "313 an epoch"):
        assert row in shown
    assert f" of {config.train.gpu_memory:.0f}" in shown
    assert "the hub is unreachable" in shown
