"""The console script: the same functions as `python -m pipelines.<name>`."""

from __future__ import annotations

import sys
import tomllib
from importlib import import_module

import pytest

from pipelines.__main__ import COMMANDS, main
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


def test_the_script_is_installed_with_the_packages_that_it_imports():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    module, function = project["project"]["scripts"]["bdpo"].split(":")
    assert getattr(import_module(module), function) is main
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {"pipelines*", "tune*"} <= {*packages}
