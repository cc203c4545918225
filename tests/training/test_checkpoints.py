"""A training that is interrupted ends as one that is not, whatever happened to its newest checkpoint.

Each of the processes that are started here runs many small trainings, one after the other.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bdpo.data.pairs import read_pairs
from bdpo.scoring.reference import ReferenceScorer
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.run_dir import RunDir
from bdpo.storage.sealed import sealed
from bdpo.training.batches import draw_held_out
from bdpo.training.checkpoints import CheckpointPart, TrainProgress, checkpoint_defect
from tests.support.killed_training import same
from tests.support.training import copied, errors, launch, score, weights

pytestmark = pytest.mark.long

STEPS = 6  # two epochs of 8, 8 and 1 pairs; 5 of the 22 are held out

CHANGES = {
    "train": {
        "num_train_epochs": 2, "save_steps": 1, "warmup_ratio": 0.3, "eval_fraction": 0.2, "eval_steps": 2,
    },
    "method": {"name": "dpo"},
}  # fmt: skip

FULL_DISK = "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))"

INFINITE_GRADIENT = """
def broken(*arguments):
    engine = build_engine(*arguments)
    norm = engine.module.model.model.norm
    norm.register_full_backward_hook(lambda module, into, out: (into[0] * float("inf"),))
    return engine
if rank == 0:  # of two workers one is enough
    training.build_engine = broken
"""

NAN_LOGPS = """
def broken(*arguments):
    engine = build_engine(*arguments)
    engine.module.register_forward_hook(lambda module, inputs, logps: logps * float("nan"))
    return engine
training.build_engine = broken
"""


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny_chat):
    return score(tmp_path_factory.mktemp("scored"), tiny_chat)


@pytest.fixture(scope="module")
def whole(scored, tmp_path_factory):
    """Run folders of a training that was not interrupted, by number of workers."""
    runs = {}
    for workers in (1, 2):
        config = copied(scored, tmp_path_factory.mktemp("whole") / "run", **CHANGES)
        launch([config], workers)
        runs[workers] = RunDir(config.run_dir)
    return runs


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.system), 2])
def resumed(request, scored, whole, tmp_path_factory):
    """(number of workers, folder in which trainings that were interrupted in many ways were resumed)."""
    folder, workers = tmp_path_factory.mktemp("resumed"), request.param

    def interrupted(name, *steps, fault="", **changes):
        """A copy of the run, when its last checkpoint was that of the last of `steps`."""
        checkpoints = [whole[workers].root / "checkpoints" / str(step) for step in steps]
        train = CHANGES["train"] | changes
        config = copied(scored, folder / name, checkpoints, train=train, method=CHANGES["method"])
        if steps:
            shutil.copy(whole[workers].metrics, folder / name)  # it had continued for some steps after that
        if fault:
            (folder / name / "fault.py").write_text(fault)
        return config

    configs = [interrupted(f"step {step}", step) for step in (1, 2, 3, STEPS)]
    for damage in (truncate, flip, Path.unlink):
        configs.append(interrupted(damage.__name__, 1, 2, 3))
        damage(part_of_last_worker(folder / damage.__name__ / "checkpoints" / "3"))
    configs.append(interrupted("none whole", 2))
    flip(part_of_last_worker(folder / "none whole" / "checkpoints" / "2"))
    configs.append(interrupted("evaluated more often", eval_steps=1))
    configs.append(interrupted("less memory", 2, tokens_per_micro_batch=64, gradient_checkpointing=True))
    configs.append(interrupted("one held out", eval_fraction=0.04))
    configs.append(interrupted("held out differ"))
    change_held_out(folder / "held out differ", scored.seed)
    best = {"metric_for_best_model": "loss", "greater_is_better": True, "load_best_model_at_end": True}
    configs.append(interrupted("best", save_steps=2, **best))
    stopped = {"full disk": FULL_DISK, "infinite gradient": INFINITE_GRADIENT, "nan": NAN_LOGPS}
    configs += [interrupted(name, 2, fault=fault) for name, fault in stopped.items()]
    launch(configs, workers, may_stop=True)
    return workers, folder


def part_of_last_worker(checkpoint):
    return sorted(checkpoint.glob("state/*_optim_states.pt"))[-1]


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change_held_out(run, seed):
    """Make the reference like the chosen response of the held-out pairs less, by 5 nats."""
    scores = pq.read_table(run / "scores.parquet")
    values = scores["ref_chosen_logps"].to_pylist()
    for row in draw_held_out(scores["pair_id"].to_pylist(), 0.2, seed):
        values[row] -= 5
    index = scores.schema.get_field_index("ref_chosen_logps")
    pq.write_table(
        scores.set_column(index, scores.schema.field(index), pa.array(values, pa.float32())),
        run / "scores.parquet",
    )


def rows(run):
    """What was logged, without the only thing that may differ."""
    logged = MetricsLog(run.metrics).read()
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in logged]


def states(run, step):
    """All that DeepSpeed saved: weights, optimizer, scheduler."""
    folder = run.root / "checkpoints" / str(step) / "state"
    return {file.name: torch.load(file, weights_only=False) for file in folder.glob("*.pt")}


def recovery(folder):
    (note,) = MetricsLog(folder / "train" / "recoveries.jsonl").read()
    return note


# At the first step, in an epoch, at an epoch's edge, at the last step; and from a damaged checkpoint.
@pytest.mark.parametrize(
    "name", ["step 1", "step 2", "step 3", f"step {STEPS}", "truncate", "flip", "unlink"]
)
def test_a_resumed_training_ends_exactly_as_the_uninterrupted_one(whole, resumed, name):
    workers, folder = resumed
    run = RunDir(folder / name)
    assert same(weights(run), weights(whole[workers]))
    assert same(states(run, STEPS), states(whole[workers], STEPS))
    assert rows(run) == rows(whole[workers])
    assert not errors(folder / name)


def test_what_saves_memory_may_change_on_the_way(whole, resumed):
    """Rounding alone tells it."""
    workers, folder = resumed
    ours, theirs = (weights(run) for run in (RunDir(folder / "less memory"), whole[workers]))
    assert not same(ours, theirs)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", [1, 2, 3, STEPS])
def test_a_recovery_says_what_was_lost(resumed, step):
    note = recovery(resumed[1] / f"step {step}")
    assert note.pop("workers") == resumed[0]
    assert note == {"step": step, "reached": STEPS, "checkpoint": str(step), "damaged": {}}


@pytest.mark.parametrize(
    ("name", "wrong"), [("truncate", "truncated"), ("flip", "damaged"), ("unlink", "missing")]
)
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(resumed, name, wrong):
    note = recovery(resumed[1] / name)
    assert (note["step"], note["checkpoint"]) == (2, "2")
    assert wrong in note["damaged"]["3"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none whole", "no intact checkpoint to resume from (2: state/"),
        ("none whole", "fresh=true starts over"),
        ("full disk", "the checkpoint of step 3 cannot be written (is the disk full?)"),
        ("infinite gradient", "the gradient of step 2 is not finite: pairs "),
        ("nan", "the loss is not finite: pairs "),
    ],
)
def test_what_stops_a_training_is_said_by_every_worker(resumed, name, said):
    workers, folder = resumed
    messages = errors(folder / name)
    assert len(messages) == workers
    assert all(said in message for message in messages)
    assert not (folder / name / "model").exists()
    assert not list((folder / name / "checkpoints").glob("[3-6]"))


def test_a_gradient_that_is_not_finite_names_the_pairs_of_its_step(scored, whole, resumed):
    """Those of step 2: what is left of the first epoch when the pairs of steps 0 and 1 were drawn."""
    from bdpo.training.batches import TrainingPlan

    ids = read_pairs(whole[1].pairs, 0, 22)["pair_id"].to_pylist()
    trained = [i for row, i in enumerate(ids) if row not in draw_held_out(ids, 0.2, scored.seed)]
    batch = TrainingPlan([1] * len(trained), scored.train, scored.seed).global_batch(2)
    message = errors(resumed[1] / "infinite gradient")[0]
    assert sorted(message.split("pairs ")[1].split(", ")) == sorted(trained[i] for i in batch)


@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_what_a_folder_alone_tells_of_a_checkpoint(whole, tmp_path, damage):
    for workers, run in whole.items():
        original = run.root / "checkpoints" / "1"
        files = [file for file in original.rglob("*.*") if file.name != "metrics.json"]
        assert len([file for file in files if file.name.startswith("part-")]) == workers
        for file in files:
            folder = tmp_path / str(workers) / file.name
            shutil.copytree(original, folder)
            assert checkpoint_defect(folder) is None
            damage(folder / file.relative_to(original))
            assert file.name in checkpoint_defect(folder)


PART = CheckpointPart(2, TrainProgress(3, 1.5, 900), {"loss": 0.25, "step": 3.0}, {})


@pytest.fixture
def parts(tmp_path):
    """A checkpoint folder of two workers with the part files alone."""
    for rank in range(PART.workers):
        (tmp_path / f"part-{rank}.json").write_text(PART.to_json())
    return tmp_path


def test_a_part_file_is_read_back(parts):
    assert CheckpointPart.read(parts, 1) == PART
    assert checkpoint_defect(parts) is None


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("key", "value"), [("step", 2), ("workers", 1), ("workers", 3), ("files", {"x": 1})])
def test_an_edited_part_file_is_damaged(parts, rank, key, value):
    file = parts / f"part-{rank}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    assert checkpoint_defect(parts) == f"part-{rank}.json is missing or damaged"


def test_a_part_file_of_another_checkpoint_is_a_defect(parts):
    (parts / "part-1.json").write_text(replace(PART, progress=TrainProgress(4, 2.0, 1200)).to_json())
    assert checkpoint_defect(parts) == "part-1.json is of another checkpoint"


def test_a_part_file_without_a_key_is_damaged(parts):
    (parts / "part-1.json").write_text(sealed({"workers": 2, "step": 3}))
    assert checkpoint_defect(parts) == "part-1.json is missing or damaged"


def test_no_flipped_byte_of_a_part_file_is_taken(parts):
    file, rng = parts / "part-1.json", random.Random(0)
    content = file.read_bytes()
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        file.write_bytes(damaged)
        if checkpoint_defect(parts) is None:
            assert CheckpointPart.read(parts, 1) == PART  # only white space changed


def test_held_out_pairs_are_evaluated_as_a_formula_says(scored, whole):
    """Of the exported model, in float64, by a scorer that knows nothing of training."""
    run = whole[1]
    pairs, scores = read_pairs(run.pairs, 0, 22), pq.read_table(run.root / "scores.parquet")
    out = draw_held_out(pairs["pair_id"].to_pylist(), 0.2, scored.seed)
    assert len(out) == math.ceil(0.2 * 22)
    model = scored.model.model_copy(update={"name_or_path": str(run.model)})
    policy = ReferenceScorer(scored.model_copy(update={"model": model}), "cpu").score(pairs.take(out))
    margins = [
        0.1 * ((c - reference_c) - (r - reference_r))
        for c, r, reference_c, reference_r in zip(
            *(
                table[f"ref_{side}_logps"].to_pylist()
                for table in (policy, scores.take(out))
                for side in ("chosen", "rejected")
            ),
            strict=True,
        )
    ]
    last = rows(run)[-1]
    assert last["eval_loss"] == pytest.approx(
        sum(math.log1p(math.exp(-m)) for m in margins) / len(out), rel=1e-5
    )
    assert last["eval_rewards/margins"] == pytest.approx(sum(margins) / len(out), rel=1e-4)
    assert last["eval_rewards/accuracies"] == pytest.approx(sum(m > 0 for m in margins) / len(out))
    assert [row["step"] for row in rows(run) if "eval_loss" in row] == [2, 4, 6]


def test_evaluation_is_that_of_one_worker(whole):
    one, two = rows(whole[1])[-1], rows(whole[2])[-1]
    assert {name for name in one if name.startswith("eval_")} >= {"eval_loss", "eval_logps/chosen"}
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


def test_a_worker_without_a_held_out_pair_takes_part(resumed):
    """One pair is held out; two workers say the same of it as its own rows."""
    _, folder = resumed
    assert not errors(folder / "one held out")
    evaluated = [row for row in rows(RunDir(folder / "one held out")) if "eval_loss" in row]
    assert evaluated
    for row in evaluated:
        margin = row["eval_rewards/margins"]
        assert row["eval_loss"] == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-5)


def test_held_out_pairs_are_never_trained_on(whole, resumed):
    """Neither how often they are evaluated nor what their scores are has a part in the training."""
    workers, folder = resumed
    for name in ("evaluated more often", "held out differ"):
        assert same(states(RunDir(folder / name), STEPS), states(whole[workers], STEPS)), name
    changed, last = rows(RunDir(folder / "held out differ"))[-1], rows(whole[workers])[-1]
    assert changed["loss"] == last["loss"]
    assert changed["eval_loss"] != last["eval_loss"]
    assert len([row for row in rows(RunDir(folder / "evaluated more often")) if "eval_loss" in row]) == STEPS


def test_the_best_checkpoint_is_exported_if_asked(whole, resumed):
    """By the greatest loss of the held-out pairs here, so that it is not the last."""
    workers, folder = resumed
    evaluated = [row for row in rows(whole[workers]) if "eval_loss" in row]
    worst = max(evaluated, key=lambda row: row["eval_loss"])["step"]
    assert worst < STEPS
    best = states(RunDir(folder / "best"), worst)
    assert same(best, states(whole[workers], worst))
    exported, last = weights(RunDir(folder / "best")), weights(whole[workers])
    assert not same(exported, last)
