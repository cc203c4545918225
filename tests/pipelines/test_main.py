"""The console script: the same functions as `python -m pipelines.<name>`."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import import_module

import pytest

from bdpo.models.tokenizer import with_template
from pipelines.__main__ import COMMANDS, main
from pipelines.presets import preset_file
from pipelines.runtime.cli import command_config
from tests.support import ROOT


def bdpo(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bdpo", *arguments])
    try:
        main()
    except SystemExit as end:
        return end.code
    return 0


def test_help_names_every_command(monkeypatch, capsys):
    assert bdpo(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_called_by_its_name(monkeypatch, capsys, name):
    assert bdpo(monkeypatch, name, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: bdpo {name} ")


def test_arguments_reach_the_command_and_its_exit_code_comes_back(monkeypatch, capsys, tmp_path):
    assert bdpo(monkeypatch, "status", str(tmp_path)) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: no run folder (it has no config.yaml)\n"
    assert bdpo(monkeypatch, "trian") == 2
    assert "unknown command trian; one of run, score, train" in capsys.readouterr().err


def test_the_presets_are_listed_and_run_from_anywhere(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    files = sorted((ROOT / "pipelines" / "configs").glob("*.yaml"))
    assert bdpo(monkeypatch, "presets") == 0
    shown = capsys.readouterr().out
    for file in files:
        assert re.search(rf"^{file.stem} +[A-Z].*\w\)?\.$", shown, re.MULTILINE), file
    assert bdpo(monkeypatch, "train", "--preset", "vicuna-7b", "--dry-run", "train.epochs=1") == 2
    assert "train.epochs" in capsys.readouterr().err
    assert bdpo(monkeypatch, "train", "--preset", "vicuna-7b", "--dry-run") == 0
    assert "billion parameters" in capsys.readouterr().out
    config = command_config(preset_file("vicuna-7b"), [])
    assert "USER: " in with_template(config).model.chat_template


def test_an_unknown_preset_and_two_sources_of_a_config_are_refused(monkeypatch, capsys):
    assert bdpo(monkeypatch, "run", "--preset", "sandbx") == 2
    assert capsys.readouterr().err == "error: --preset sandbx: unknown preset; did you mean sandbox?\n"
    assert bdpo(monkeypatch, "run", "--preset", "sandbox", "--config", "my.yaml") == 2
    assert "not allowed with" in capsys.readouterr().err
    assert bdpo(monkeypatch, "run") == 2
    assert "one of the arguments --config --preset is required" in capsys.readouterr().err


def test_the_script_is_installed_with_the_packages_that_it_imports():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    module, function = project["project"]["scripts"]["bdpo"].split(":")
    assert getattr(import_module(module), function) is main
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {"pipelines*", "tune*"} <= {*packages}
    assert project["tool"]["setuptools"]["package-data"]["pipelines"] == ["configs/*"]
