"""A training that is interrupted ends as one that is not, whatever became of its newest checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_training import copied, launch, score, weights

from bdpo.checkpoints import why_incomplete
from bdpo.runs import RunDir

STEPS = 6  # two epochs of 8, 8 and 6 pairs
CHANGES = {"num_train_epochs": 2, "save_steps": 1, "eval_steps": 2, "warmup_ratio": 0.3}


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny_chat):
    return score(tmp_path_factory.mktemp("scored"), tiny_chat)


@pytest.fixture(scope="module", params=[1, 2])
def whole(request, scored, tmp_path_factory):
    """(number of workers, run folder) of a training that was not interrupted."""
    config = copied(scored, tmp_path_factory.mktemp("whole") / "run", train=CHANGES)
    launch([config], request.param)
    return request.param, RunDir(config.run_dir)


def rows(run):
    """What was logged, without the only thing that may differ."""
    logged = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in logged]


def states(run, step):
    """All that DeepSpeed saved: weights, optimizer, scheduler."""
    folder = run.root / "checkpoints" / str(step) / "state"
    return {file.name: torch.load(file, weights_only=False) for file in folder.glob("*.pt")}


def same(a, b):
    """Equal to the last bit, in whatever lists and dicts tensors lie."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or vars(a) == vars(b)


def interrupted(scored, whole, folder, *steps):
    """A copy of the run, as it was when its last checkpoint was that of the last of `steps`."""
    config = copied(scored, folder, [whole.root / "checkpoints" / str(s) for s in steps], train=CHANGES)
    shutil.copy(whole.metrics, folder)  # it had gone on for some steps after that checkpoint
    return config


def test_a_resumed_training_ends_exactly_as_the_uninterrupted_one(scored, whole, tmp_path):
    """At the first step, in an epoch, at an epoch's edge, at the last step, and from a damaged checkpoint."""
    workers, run = whole
    configs = {step: interrupted(scored, run, tmp_path / str(step), step) for step in (1, 2, 3, STEPS)}
    configs["truncated"] = interrupted(scored, run, tmp_path / "truncated", 1, 2, 3)
    configs["flipped"] = interrupted(scored, run, tmp_path / "flipped", 2, 3)
    configs["gone"] = interrupted(scored, run, tmp_path / "gone", 2, 3)
    for name, damage in {"truncated": truncate, "flipped": flip, "gone": Path.unlink}.items():
        damage(part_of_last_worker(tmp_path / name / "checkpoints" / "3"))
    launch(list(configs.values()), workers)
    for name, config in configs.items():
        resumed = RunDir(config.run_dir)
        assert all(torch.equal(value, weights(run)[key]) for key, value in weights(resumed).items()), name
        assert same(states(resumed, STEPS), states(run, STEPS)), name
        assert rows(resumed) == rows(run), name
    notes = {name: recovery(tmp_path / str(name)) for name in configs}
    assert [notes[step]["step"] for step in (1, 2, 3, STEPS)] == [1, 2, 3, STEPS]
    assert all(notes[step]["damaged"] == {} for step in (1, 2, 3, STEPS))
    for name, wrong in {"truncated": "truncated", "flipped": "damaged", "gone": "missing"}.items():
        assert (notes[name]["checkpoint"], notes[name]["step"], notes[name]["reached"]) == ("2", 2, STEPS)
        assert wrong in notes[name]["damaged"]["3"]


def recovery(folder):
    (line,) = (folder / "train" / "recoveries.jsonl").read_text().splitlines()
    return json.loads(line)


def part_of_last_worker(checkpoint):
    return sorted(checkpoint.glob("state/*_optim_states.pt"))[-1]


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_what_a_folder_alone_tells_of_a_checkpoint(whole, tmp_path):
    workers, run = whole
    for name, damage in {"truncated": truncate, "missing": Path.unlink}.items():
        for file in sorted((run.root / "checkpoints" / "1").rglob("*.*")):
            folder = tmp_path / name / file.name
            shutil.copytree(run.root / "checkpoints" / "1", folder)
            assert why_incomplete(folder) is None
            damage(folder / file.relative_to(run.root / "checkpoints" / "1"))
            assert file.name in why_incomplete(folder)


def test_no_checkpoint_is_begun_anew_or_taken_for_another_number_of_workers(scored, whole, tmp_path):
    workers, run = whole
    damaged = interrupted(scored, run, tmp_path / "damaged", 2)
    flip(part_of_last_worker(tmp_path / "damaged" / "checkpoints" / "2"))
    with pytest.raises(AssertionError, match=r"no checkpoint to go on from .2: .*fresh=true starts over"):
        launch([damaged], workers)
    other = interrupted(scored, run, tmp_path / "other", 2)
    with pytest.raises(
        AssertionError, match=f"of {workers} workers cannot .* by {3 - workers}; set train.work"
    ):
        launch([other], 3 - workers)


def test_a_full_disk_is_said_and_the_same_command_goes_on(scored, whole, tmp_path):
    """Files of more than 20 kB cannot be written from the third checkpoint on."""
    workers, run = whole
    config = interrupted(scored, run, tmp_path / "run", 2)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))"
    with pytest.raises(AssertionError, match="the checkpoint of step 3 cannot be written .is the disk full"):
        launch([config], workers, fault=limit)
    launch([config], workers)
    assert same(states(RunDir(config.run_dir), STEPS), states(run, STEPS))
