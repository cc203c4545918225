"""What every command refuses before it does anything."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys

import pytest
import ray

from bdpo.errors import UserError
from bdpo.storage.manifests import write_manifest
from bdpo.storage.run_dir import RunDir
from pipelines.runtime.cli import Command, command_config
from pipelines.runtime.stage import Stage, check_inputs
from tests.support import ROOT
from tests.support.helpers import tiny_config


class Invented(Stage):
    """A stage that does what a test gives it to do."""

    name = "invented"
    work = staticmethod(lambda run: None)

    def outputs(self):
        return [self.run.report]

    def complete(self):
        return self.work(self.run)

    def status(self):
        raise NotImplementedError


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("{run_dir: runs/first, model: {name_or_path: sandbox}, data: {path: x}}")
    return str(file)


def test_a_job_does_not_lose_its_results_with_its_folder(file, monkeypatch):
    assert command_config(file, []).run_dir == "runs/first"  # a command on one's own machine
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UserError, match="run_dir=runs/first: a job runs in a folder of its own"):
        command_config(file, [])
    for lasting in ("/shared/runs/first", "~/runs/first", "s3://bucket/runs/first"):
        assert command_config(file, [f"run_dir={lasting}"]).run_dir == lasting


def test_a_full_disk_is_said_in_one_line_whatever_is_being_written(file, tmp_path, monkeypatch, capsys):
    """A limit on the size of files: the system refuses the write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def work(run):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        write_manifest(run.data / "manifest.json", {"weights": "a" * 2000})

    monkeypatch.setattr(Invented, "work", staticmethod(work))
    try:
        with pytest.raises(SystemExit) as ended:
            Command("", (Invented,))(["--config", file, f"run_dir={tmp_path}/run"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ended.value.code == 2
    said = f"error: run_dir={tmp_path}/run: cannot be written (File too large)\n"
    assert capsys.readouterr().err.endswith(said)


DELETED = {
    "the folder": (lambda run: shutil.rmtree(run.root), ""),
    "its lock": (lambda run: (run.root / ".lock").unlink(), "/.lock"),
    "its lock, and another command began": (lambda run: deleted_and_locked(run), "/.lock"),
}


def deleted_and_locked(run):
    (run.root / ".lock").unlink()
    (run.root / ".lock").touch()


@pytest.mark.parametrize("how", DELETED)
def test_what_is_deleted_under_a_command_ends_it_in_one_line(file, tmp_path, monkeypatch, capsys, how):
    """The command meets the loss by itself, before its signs of life do."""
    delete, what = DELETED[how]

    def work(run):
        delete(run)
        (run.root / "data" / "manifest.json").read_text()

    monkeypatch.setattr(Invented, "work", staticmethod(work))
    with pytest.raises(SystemExit) as ended:
        Command("", (Invented,))(["--config", file, f"run_dir={tmp_path}/run"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/run{what}: was deleted while this command worked there")


@pytest.mark.parametrize("how", ["folder", "lock"])
def test_a_command_that_only_computes_is_ended_as_well(file, tmp_path, how):
    """By its signs of life, in seconds: it would write its results where nobody looks for them."""
    program = f"""if True:
        import shutil, time
        from pathlib import Path
        from bdpo.storage import lease
        from pipelines.runtime.cli import exit_codes
        lease.RENEWAL_SECONDS = 0.2
        folder = Path({str(tmp_path)!r}) / "run"
        folder.mkdir()
        (folder / "config.yaml").write_text("")
        with exit_codes(), lease.lock(folder):
            shutil.rmtree(folder) if {how == "folder"} else (folder / ".lock").unlink()
            time.sleep(60)"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.endswith("was deleted while this command worked there; stopping")


def test_a_node_without_memory_is_reported_in_one_line(file, tmp_path, monkeypatch, capsys):
    def work(run):
        raise ray.exceptions.RayActorError(
            error_msg="it died due to the node running low on memory. "
            "Memory on the node (IP: 10.0.0.7, ID: 1) was 22.9GB used / 24.0GB limit (0.95)"
        )

    monkeypatch.setattr(Invented, "work", staticmethod(work))
    with pytest.raises(SystemExit) as ended:
        Command("", (Invented,))(["--config", file, f"run_dir={tmp_path}/run"])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the memory of node 10.0.0.7 was full (22.9GB used / 24.0GB); ")
    assert line.endswith("the same command resumes")


def test_another_error_of_the_system_is_not_taken_for_it(file, tmp_path, monkeypatch):
    monkeypatch.setattr(Invented, "work", staticmethod(lambda run: (tmp_path / "nothing").read_text()))
    with pytest.raises(FileNotFoundError):
        Command("", (Invented,))(["--config", file, f"run_dir={tmp_path}/run"])


def test_fresh_discards_what_the_stages_make_and_nothing_else(file, tmp_path, monkeypatch):
    run, there = tmp_path / "run", []
    for made in ("report/report.html", "model/config.json"):
        (run / made).parent.mkdir(parents=True)
        (run / made).write_text("{}")
    (run / "config.yaml").write_text("{}")
    work = staticmethod(lambda run: there.extend(path.name for path in run.root.iterdir()))
    monkeypatch.setattr(Invented, "work", work)
    Command("", (Invented,))(["--config", file, f"run_dir={run}"])
    assert {"report", "model"} <= {*there}
    there.clear()
    Command("", (Invented,))(["--config", file, f"run_dir={run}", "fresh=true"])
    assert "report" not in there
    assert "model" in there


@pytest.mark.parametrize("fresh", ["true", "false"])
def test_inputs_are_checked_before_anything_is_discarded_or_begun(file, tmp_path, monkeypatch, capsys, fresh):
    (tmp_path / "run" / "report").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("{}")

    def refuse(config, run):
        raise UserError("data.path=x: not found")

    monkeypatch.setattr(Invented, "input_checks", lambda stage: {"data": refuse})
    monkeypatch.setattr(Invented, "work", staticmethod(lambda run: pytest.fail("it was begun")))
    with pytest.raises(SystemExit) as ended:
        Command("", (Invented,))(["--config", file, f"run_dir={tmp_path}/run", f"fresh={fresh}"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: data.path=x: not found\n"
    assert (tmp_path / "run" / "report").is_dir()


def test_options_are_those_that_a_stage_declares(file, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        Command("", (Invented,))(["--config", file, "--inspect"])
    assert "unrecognized arguments: --inspect" in capsys.readouterr().err
    monkeypatch.setattr(Invented, "inspect", lambda stage: print(f"inspected {stage.run.root.name}"))
    Command("", (Invented,))(["--config", file, f"run_dir={tmp_path}/run", "--inspect"])
    assert capsys.readouterr().out == "inspected run\n"
    assert not (tmp_path / "run").exists()


class TestInputs:
    """Which checks of a command's stages are made before the first of them."""

    @pytest.fixture
    def checked(self, tmp_path, monkeypatch):
        """checked(*stages, fresh=False): the stages whose inputs are checked."""

        def made(*kinds, fresh=False):
            config = tiny_config(tmp_path / "run", tmp_path / "model", tmp_path / "pairs")
            config = config.model_copy(update={"fresh": fresh})
            names = []
            note = lambda stage, *_: names.append(type(stage).__name__)  # noqa: E731
            monkeypatch.setattr(Trains, "note", note, raising=False)
            check_inputs([kind(config, RunDir(config.run_dir)) for kind in kinds])
            return names

        return made

    def test_a_model_that_an_earlier_stage_trains_counts_as_there(self, checked):
        assert checked(Trains, Works) == ["Trains", "Works"]
        assert checked(Works) == []
        assert checked(Works, Trains) == ["Trains"]

    def test_where_all_is_done_nothing_is_checked_unless_it_is_started_over(self, checked, monkeypatch):
        monkeypatch.setattr(Trains, "is_done", True)
        assert checked(Trains, Invented) == []  # which has nothing to check
        assert checked(Trains, fresh=True) == ["Trains"]
        assert checked(Trains, Works) == ["Trains", "Works"]  # one is not done: all are checked

    def test_a_stage_that_does_not_apply_is_not_checked(self, checked, monkeypatch):
        monkeypatch.setattr(Trains, "applies", False)
        assert checked(Trains, Works) == []


class Trains(Invented):
    """Its check notes the name of the class."""

    def input_checks(self):
        return {type(self).__name__: self.note}


class Works(Trains):
    """Works on a model that is not there."""

    model_from = Trains
    has_inputs = is_done = False
    applies = True
