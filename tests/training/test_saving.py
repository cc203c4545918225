"""A checkpoint that is written beside the training holds the state of its step, as DeepSpeed saves it."""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from bdpo.errors import UserError
from bdpo.models.loading import model_config
from bdpo.storage.run_dir import RunDir
from bdpo.training.checkpoints import TrainProgress
from bdpo.training.launcher import Launcher
from bdpo.training.memory import checkpoint_bytes
from bdpo.training.saving import CheckpointSaver, HostCopies, Staging, _tensors
from tests.support.killed_training import same
from tests.support.training import copied, launch, score

pytestmark = pytest.mark.long

LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"]}

VARIANTS = {
    **{f"stage {stage}": {"zero_stage": stage} for stage in (0, 1, 2, 3)},
    "stage 3, lora": {"zero_stage": 3, "lora": LORA, "learning_rate": 1e-2},
    "stage 2, offload": {"zero_stage": 2, "offload": "cpu"},
}

# Each file takes longer to write than a step takes, so that steps go on meanwhile.
SLOW_AND_BY_DEEPSPEED = """
import time
from bdpo.training import saving
class Both(saving.CheckpointSaver):
    def save(self, progress, metrics, further):
        folder = run.root / "deepspeed" / str(progress.step)
        self.engine.save_checkpoint(str(folder), tag="state", exclude_frozen_parameters=True)
        super().save(progress, metrics, further)
def slow(*arguments, write=saving._write):
    time.sleep(0.5)
    write(*arguments)
saving._write, training.CheckpointSaver = slow, Both
"""


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.system), 2])
def saved(request, tmp_path_factory, tiny_chat):
    """Trainings of 6 steps with checkpoints after 2, 4 and 6, each of which DeepSpeed saved as well."""
    scored = score(tmp_path_factory.mktemp("scored"), tiny_chat, tied=True)
    folder, configs = tmp_path_factory.mktemp("saved"), {}
    for name, train in VARIANTS.items():
        train = {"num_train_epochs": 2, "save_steps": 2, **train}
        configs[name] = copied(scored, folder / name, train=train)
        (folder / name / "fault.py").write_text(SLOW_AND_BY_DEEPSPEED)
    launch(list(configs.values()), workers=request.param)
    return configs


def loaded(folder):
    return {file.name: torch.load(file, weights_only=False) for file in sorted(folder.rglob("*.pt"))}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_checkpoint_is_what_deepspeed_saves_at_its_step(saved, name):
    run = Path(saved[name].run_dir)
    checkpoints = sorted(folder.name for folder in (run / "checkpoints").iterdir())
    assert checkpoints == ["2", "4", "6"]
    for step in checkpoints:
        ours, theirs = (loaded(run / whose / step / "state") for whose in ("checkpoints", "deepspeed"))
        assert ours
        assert same(ours, theirs)
    first, last = (loaded(run / "checkpoints" / step / "state") for step in ("2", "6"))
    assert not same(first, last)


def test_a_checkpoint_takes_no_more_room_than_deepspeeds(saved):
    """Tied weights are one tensor, and a part of a large tensor is a part alone."""
    for config in saved.values():
        run = Path(config.run_dir)
        ours, theirs = (
            sum(file.stat().st_size for file in (run / whose / "6" / "state").glob("*.pt"))
            for whose in ("checkpoints", "deepspeed")
        )
        assert ours <= 1.05 * theirs


@pytest.mark.parametrize("name", ["stage 0", "stage 1", "stage 2", "stage 3"])
def test_a_checkpoint_has_the_size_that_the_planner_says(saved, name):
    """Tensors alone, each memory once; the parts of workers are padded to one length."""
    config = saved[name]
    states = loaded(Path(config.run_dir) / "checkpoints" / "6" / "state")
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(states)}
    expected = checkpoint_bytes(config, model_config(config.model))
    assert sum(tensors.values()) == pytest.approx(expected, rel=0.02)


def test_minutes_make_a_checkpoint_due_and_the_last_step_has_one(tmp_path, tiny_chat):
    scored = score(tmp_path / "scored", tiny_chat)
    often = copied(scored, tmp_path / "often", train={"save_steps": None, "save_minutes": 1e-6})
    seldom = copied(scored, tmp_path / "seldom", train={"save_steps": None, "save_minutes": 60.0})
    by_steps = {
        "save_steps": 2, "save_minutes": 1e-6, "eval_fraction": 0.2, "eval_steps": 2, "max_steps": 4,
        "metric_for_best_model": "loss",
    }  # fmt: skip
    best = copied(scored, tmp_path / "best", train=by_steps)
    launch([often, seldom, best], workers=2)
    steps = {
        config.run_dir: sorted(int(f.name) for f in (Path(config.run_dir) / "checkpoints").iterdir())
        for config in (often, seldom, best)
    }
    assert list(steps.values()) == [[1, 2, 3], [3], [2, 4]]


def test_a_copy_shares_nothing_and_keeps_what_is_tied():
    weights = torch.arange(12.0).reshape(3, 4)
    state = {
        "a": OrderedDict(weight=weights.T, tied=weights.T.detach(), part=weights[1], none=torch.empty(0)),
        "b": [(torch.nn.Parameter(weights.clone()), 3), {"name": "x", "shape": weights.shape}],
    }
    copies = HostCopies()
    copied_state = copies.copy("file", state)
    assert same(copied_state, state)
    assert type(copied_state["a"]) is OrderedDict
    assert copied_state["a"]["tied"] is copied_state["a"]["weight"]
    kept = [tensor.clone() for tensor in _tensors(copied_state)]
    with torch.no_grad():
        for tensor in _tensors(state):
            tensor.mul_(-1)
    assert same(list(_tensors(copied_state)), kept)
    again = copies.copy("file", state)
    memory = [[tensor.data_ptr() for tensor in _tensors(each)] for each in (copied_state, again)]
    assert memory[0] == memory[1]
    assert same(again, state)


class Engine:
    """An engine of one worker, of which a checkpoint is one file."""

    device = torch.device("cpu")


def saver(tmp_path, monkeypatch, error=None):
    """A saver whose thread writes to a disk with a fault, and what it reported."""
    from bdpo.config import TrainConfig

    def states(engine, folder, tag, copied, further):
        (folder / tag).mkdir()
        return {folder / tag / "model.pt": Unwritable(error) if error else torch.ones(2)}

    monkeypatch.setattr("bdpo.training.saving.checkpoint_states", states)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    reported = []
    launcher = Launcher(list, lambda folder, metrics: reported.append((folder, metrics)))
    return CheckpointSaver(Engine(), RunDir(tmp_path / "run"), TrainConfig(), launcher), reported


class Unwritable:
    """What cannot be pickled, as if the disk did not take it."""

    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error


def save_and_then(saves, later):
    """Save a checkpoint, wait until it is written, or is not, and call the method `later`."""
    with saves:
        saves.save(TrainProgress(1), {}, {})
        saves.writing.future.exception()
        later(saves)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "later",
    [
        lambda saves: saves.due(2),
        lambda saves: saves.save(TrainProgress(2), {}, {}),
        lambda saves: saves.finish(),
    ],
)
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), UserError),
        (RuntimeError("[enforce fail at inline_container.cc:672]"), UserError),
        (RuntimeError("something else"), RuntimeError),
    ],
)
def test_what_cannot_be_written_is_not_reported_and_takes_no_room(
    tmp_path, monkeypatch, error, raised, later
):
    saves, reported = saver(tmp_path, monkeypatch, error)
    said = "of step 1 .*is the disk full" if raised is UserError else "something else"
    with pytest.raises(raised, match=said):
        save_and_then(saves, later)
    assert not reported
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("alone")
def test_what_was_begun_and_not_reported_takes_no_room_when_a_training_stops(tmp_path, monkeypatch):
    saves, reported = saver(tmp_path, monkeypatch)
    with saves:
        saves.save(TrainProgress(1), {}, {})
        assert list(tmp_path.iterdir())
    assert not reported
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("alone")
def test_what_a_killed_worker_had_staged_is_removed_by_the_next_one_of_its_run(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    runs = [RunDir(tmp_path / name) for name in ("one", "other")]
    left, others = (Staging(run).new() for run in runs)
    new = Staging(runs[0]).new()
    assert sorted(tmp_path.iterdir()) == sorted([new, others])
    assert new != left
