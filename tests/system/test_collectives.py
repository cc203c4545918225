"""All workers of a training take part in the same collectives, in whatever phase: training, evaluation on
held-out pairs, checkpoints, exports at rungs and at the end, and the loading of the best checkpoint.

A worker that makes another number of them, or of forwards under ZeRO 3, where each forward gathers weights,
waits for the others for ever. So they are counted on each worker at the beginning of each phase.
"""

from __future__ import annotations

import json

import pytest

from bdpo.training.rungs import Rungs
from tests.support.training import copied, launch, score

LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"]}

VARIANTS = {
    "zero 3": {"zero_stage": 3},
    "zero 2": {"zero_stage": 2},
    "zero 3, lora": {"zero_stage": 3, "lora": LORA},
    "zero 3, recomputed": {"zero_stage": 3, "gradient_checkpointing": True},
    "zero 3, own logits": {"zero_stage": 3},
    "zero 3, best": {"zero_stage": 3, "load_best_model_at_end": True, "metric_for_best_model": "loss"},
}

OWN_LOGITS = "granite"
"""An architecture whose own logits are used: of a batch of many rows they are made in several forwards where
no gradient is required, were the forwards not counted on."""

RUNG = 2

WITH_FORWARDS = {
    "an optimizer step": True,
    "an evaluation on held-out pairs": True,
    "the copy of a checkpoint": False,
    "the wait for a checkpoint to be written": False,
    "the export of the model": True,
    "the wait for a decision": False,
}
"""Phase -> whether workers make forwards in it; in each they wait for each other."""

WORKERS = 2

# 22 pairs: of the last step and of the held-out pairs no equal share falls to both workers.
TRAIN = {"save_steps": 1, "eval_steps": 1, "eval_fraction": 0.1, "tokens_per_micro_batch": 400}

# Writes [phase, collectives, forwards of the engine's modules] when a phase begins, and at the end.
COUNT = """
from bdpo.models import logps
logps.CHUNK_ELEMENTS = 1
group, counts, forwards = torch.distributed.group.WORLD, [], [0]
def count(phase):
    counts.append([str(phase), group._get_sequence_number_for_group(), forwards[0]])
def counting(*arguments):
    engine = build_engine(*arguments)
    for module in engine.module.modules():
        module.register_forward_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
    return engine
training.build_engine = counting
plain_launcher, plain_train = training.Launcher, training.train
training.Launcher = lambda reported, report: plain_launcher(reported, report, count)
def train(*arguments):
    training.Launcher, training.train = plain_launcher, plain_train
    plain_train(*arguments)
    count("end")
    (run.root / f"counts-{rank}.json").write_text(json.dumps(counts))
training.train = train
"""


@pytest.fixture(scope="module")
def counts(tmp_path_factory, tiny_chat):
    """Variant -> the counts of each worker."""
    folder = tmp_path_factory.mktemp("counts")
    plain = score(folder / "plain", tiny_chat)
    own_logits = score(folder / "own", tiny_chat, architecture=OWN_LOGITS)
    runs = {name: folder / f"run-{number}" for number, name in enumerate(VARIANTS)}
    configs = [
        copied(own_logits if "own logits" in name else plain, run, train=TRAIN | VARIANTS[name])
        for name, run in runs.items()
    ]
    for run in runs.values():
        (run / "fault.py").write_text(COUNT)
        Rungs(run / "rungs", (RUNG,)).promote(RUNG)
    launch(configs, WORKERS, rungs=(RUNG,))
    found = {}
    for name, run in runs.items():
        files = [run / f"counts-{rank}.json" for rank in range(WORKERS)]
        found[name] = [json.loads(file.read_text()) for file in files]
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_every_worker_makes_the_same_forwards_and_collectives(counts, name):
    first, *others = counts[name]
    assert others == [first] * (WORKERS - 1)
    phases = [phase for phase, *_ in first]
    for phase, forwards_expected in WITH_FORWARDS.items():
        begun = phases.index(phase)
        (_, *before), (_, *then) = first[begun : begun + 2]
        collectives, forwards = (after - now for now, after in zip(before, then, strict=True))
        print(f"{name}: {phase}: {collectives} collectives, {forwards} forwards")
        assert collectives > 0
        assert (forwards > 0) == forwards_expected
    assert phases.count("the export of the model") == 2


def test_activations_are_recomputed_where_that_is_asked(counts):
    """In a step each module is forwarded once more, for its gradient."""
    in_a_step = {}
    for name in ("zero 3", "zero 3, recomputed"):
        (*_, before), (*_, then) = counts[name][0][:2]
        in_a_step[name] = then - before
    assert in_a_step["zero 3, recomputed"] > in_a_step["zero 3"]
