"""Every ZeRO option trains like a plain loop in torch, which this file writes out; real DeepSpeed on CPU."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from bdpo.config import parse_config
from bdpo.data.pairs import read_pairs
from bdpo.errors import UserError
from bdpo.models.loading import load_model
from bdpo.models.logps import LogpsModel
from bdpo.scoring.reference import ReferenceScorer
from bdpo.storage.run_dir import RunDir
from bdpo.training.batches import TrainingPlan
from bdpo.training.engine import (
    _parameter_groups,
    cores_of_a_worker,
    deepspeed_config,
    learning_rates,
    require_on_first_worker,
)
from bdpo.training.pairs import TrainingPairs
from tests.support import ROOT
from tests.support.helpers import invented_pairs, save_model, tiny_config, write_jsonl
from tests.support.scored_run import prepared_run
from tests.support.training import launch, results

pytestmark = pytest.mark.long

PAIRS, STEPS = 22, 4  # batches of 8, 8, 6 and 8 pairs

VARIANTS = {
    "stage 0": {"zero_stage": 0},
    "stage 1": {"zero_stage": 1},
    "stage 2": {"zero_stage": 2},
    "stage 3": {"zero_stage": 3},
    "stage 2, optimizer on the CPU": {"zero_stage": 2, "offload": "cpu"},
    "stage 3, all on the CPU": {"zero_stage": 3, "offload": "cpu", "offload_parameters": True},
}

# By hand, `BDPO_TEST_NVME=1 pytest tests/training/test_engine.py`: the op takes minutes to compile.
if "BDPO_TEST_NVME" in os.environ:
    VARIANTS["stage 3, optimizer on disk"] = {"zero_stage": 3, "offload": "nvme", "nvme_path": "nvme"}

# Put before a training: of the model that it loads, how much is there whole at any one time.
WATCHED_LOAD = """
import gc
from deepspeed.runtime.zero.partition_parameters import GatheredParameters

gathered, enter = [], GatheredParameters.__enter__
def watched(self):
    enter(self)
    parameters = [o for o in gc.get_objects() if isinstance(o, torch.nn.Parameter) and hasattr(o, "ds_id")]
    gathered.append(sum(p.numel() for p in parameters))  # a partitioned one has 0
    (run.root / f"gathered-{rank}").write_text(str(max(gathered)))
GatheredParameters.__enter__ = watched

import deepspeed
initialize = deepspeed.initialize
def loaded(*arguments, **settings):  # later, a forward keeps what it gathered for the export after it
    GatheredParameters.__enter__ = enter
    return initialize(*arguments, **settings)
deepspeed.initialize = loaded
"""


# Notes what a training begins with.
FACTS = """
def noted(*arguments):
    engine = build_engine(*arguments)
    facts = {"threads": torch.get_num_threads(), "training": engine.module.training}
    (run.root / f"facts-{rank}.json").write_text(json.dumps(facts))
    return engine
training.build_engine = noted
"""


def scored(folder, chat, dtype, **train):
    """A run folder with prepared and scored pairs."""
    config = tiny_config(
        folder / "run",
        save_model(folder / "model", chat),
        write_jsonl(folder / "pairs.jsonl", invented_pairs(PAIRS)),
        train={"tokens_per_micro_batch": 256, "weight_decay": 0.1, "warmup_ratio": 0.0} | train,
    )
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    run = prepared_run(config)
    scores = ReferenceScorer(config, "cpu").score(read_pairs(run.pairs, 0, PAIRS))
    pq.write_table(scores, run.root / "scores.parquet")
    return config


def variant(config, folder, **train):
    """A copy of a run with other options of training."""
    shutil.copytree(config.run_dir, folder)
    if "nvme_path" in train:
        train["nvme_path"] = str(folder / train["nvme_path"])
    values = config.model_dump()
    return parse_config(values | {"run_dir": str(folder), "train": values["train"] | train}, "test")


def plain_loop(config):
    """AdamW on float32 masters, as a textbook has it; gradients of the model's dtype, summed in float32."""
    torch.manual_seed(0)
    run = RunDir(config.run_dir)
    data = TrainingPairs.load(config, run, pq.read_table(run.root / "scores.parquet"))
    plan = TrainingPlan(data.lengths, config.train, config.seed)
    model = load_model(Path(config.model.name_or_path), config.model).train()
    policy = LogpsModel(model, config.data.max_length)
    parameters = list(model.parameters())
    masters = [p.detach().float().clone() for p in parameters]
    first, second = ([torch.zeros_like(m) for m in masters] for _ in range(2))
    norms, losses = [], []
    for step in range(plan.total_steps):
        pairs = len(plan.global_batch(step))
        grads, total = [torch.zeros_like(m) for m in masters], 0.0
        for batch in plan.micro_batches(step, 1, data.layout)[0]:
            output = config.method.loss(data.packed(batch).logps(policy))
            (output.loss.sum() / pairs).backward()
            total += output.loss.sum().item() / pairs
            for grad, parameter in zip(grads, parameters, strict=True):
                grad += parameter.grad.float()
                parameter.grad = None
        losses.append(total)
        norms.append(math.sqrt(sum(grad.double().square().sum().item() for grad in grads)))
        clip = min(1.0, config.train.max_grad_norm / (norms[-1] + 1e-6))
        for p, master, grad, m, v in zip(parameters, masters, grads, first, second, strict=True):
            grad *= clip
            decay = config.train.weight_decay if p.ndim > 1 else 0.0
            master *= 1 - config.train.learning_rate * decay
            m.mul_(0.9).add_(grad, alpha=0.1)
            v.mul_(0.999).addcmul_(grad, grad, value=0.001)
            unbiased = (v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            master -= config.train.learning_rate / (1 - 0.9 ** (step + 1)) * m / unbiased
            p.data.copy_(master)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return losses, norms, {n.removeprefix("module."): p for n, p in weights.items()}


def test_a_worker_does_not_wait_for_what_deepspeed_imports_unasked():
    """mlflow for its autotuner, and torch's compiler for its Muon optimizer, which every engine imports."""
    code = """
import importlib.util, sys
from bdpo.models.deepspeed_internals import import_deepspeed

assert import_deepspeed().initialize and "deepspeed.autotuning" in sys.modules
assert "mlflow" not in sys.modules
import deepspeed.runtime.zero.muon.muon_optimizer
assert "torch._inductor.compile_fx" not in sys.modules
assert importlib.util.find_spec("mlflow")  # a tracker can import it later
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {"DS_ACCELERATOR": "cpu"}
    )


@pytest.mark.parametrize(
    ("kind", "falls"),
    [
        ("linear", lambda done: 1 - done),
        ("cosine", lambda done: (1 + math.cos(math.pi * done)) / 2),
        ("constant", lambda done: 1),
    ],
)
def test_learning_rates(kind, falls):
    """Risen to the full rate over 3 of 10 steps, then as the schedule's name says."""
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.5)
    scheduler = learning_rates(kind, optimizer, 3, 10)
    for step in range(10):
        expected = 0.5 * (step / 3 if step < 3 else falls((step - 3) / 7))
        assert scheduler.get_last_lr()[0] == pytest.approx(expected)
        optimizer.step()
        scheduler.step()


OFFLOADED = {"device": "cpu", "nvme_path": None, "pin_memory": torch.cuda.is_available()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("train", [train for name, train in VARIANTS.items() if "disk" not in name], ids=str)
def test_the_config_of_deepspeed_is_that_of_the_training(tmp_path, dtype, train):
    """Batches have one pair as far as it knows; without ZeRO it would clip once more."""
    if dtype == "bfloat16" and not train["zero_stage"]:
        return  # which is refused
    values = tiny_config(tmp_path, tmp_path, tmp_path, train=train | {"max_grad_norm": 0.5}).model_dump()
    found = deepspeed_config(parse_config(values | {"model": values["model"] | {"dtype": dtype}}, "test"))
    zero = found["zero_optimization"]
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (1, 1)
    assert found["gradient_clipping"] == (0.5 if train["zero_stage"] else 0.0)
    assert found["bf16"] == {"enabled": dtype == "bfloat16"}
    assert zero["stage"] == train["zero_stage"]
    assert zero["offload_optimizer"] == (OFFLOADED if "offload" in train else None)
    assert zero["offload_param"] == (OFFLOADED if "offload_parameters" in train else None)


def test_what_is_trained_decays_where_it_is_a_matrix():
    """Frozen parameters are in no group, and no group is empty."""
    matrix, vector, frozen = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (3,), (4, 4)))
    frozen.requires_grad_(False)
    decays, stays = {"params": [matrix], "weight_decay": 0.1}, {"params": [vector], "weight_decay": 0.0}
    for parameters, groups in (
        ([vector, frozen, matrix], [decays, stays]),
        ([matrix, frozen], [decays]),
        ([vector], [stays]),
    ):
        assert _parameter_groups(torch.nn.ParameterList(parameters), 0.1) == groups


@pytest.mark.usefixtures("alone")
def test_what_the_first_worker_finds_wrong_is_raised_by_all():
    checked = []
    require_on_first_worker(lambda: checked.append(True))
    assert checked == [True]

    def refuse():
        raise UserError("model: incomplete")

    with pytest.raises(UserError, match=r"^model: incomplete$"):
        require_on_first_worker(refuse)


@pytest.fixture(scope="module")
def float32(tmp_path_factory, tiny_chat):
    """(plain loop, every variant's config, how many parameters a worker had whole while loading)."""
    folder = tmp_path_factory.mktemp("float32")
    base = scored(
        folder, tiny_chat, "float32", max_steps=STEPS, lr_scheduler_type="constant", max_grad_norm=0.5
    )
    configs = [variant(base, folder / f"{i}", **train) for i, train in enumerate(VARIANTS.values())]
    loading = folder / f"{list(VARIANTS).index('stage 3')}"
    (loading / "fault.py").write_text(WATCHED_LOAD)
    for name, number in (("stage 0", 0), ("stage 3, all on the CPU", 5)):
        assert list(VARIANTS)[number] == name
        (folder / f"{number}" / "fault.py").write_text(FACTS)
    launch(configs, workers=2)
    gathered = [int((loading / f"gathered-{rank}").read_text()) for rank in range(2)]
    return plain_loop(base), dict(zip(VARIANTS, configs, strict=True)), gathered


@pytest.mark.parametrize(("workers", "cores"), [(1, 16), (8, 2), (99, 1)])
def test_offloaded_states_are_stepped_by_the_cores_of_a_worker(monkeypatch, workers, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(workers))
    assert cores_of_a_worker() == cores


def test_only_offloaded_states_have_more_threads_and_the_model_is_in_training_mode(float32):
    threads = {"stage 0": 1, "stage 3, all on the CPU": cores_of_a_worker()}
    for name, expected in threads.items():
        facts = json.loads((RunDir(float32[1][name].run_dir).root / "facts-0.json").read_text())
        assert facts == {"threads": expected, "training": True}


@pytest.mark.parametrize("name", VARIANTS)
def test_two_workers_train_as_the_plain_loop(float32, name):
    (losses, norms, weights), configs, _ = float32
    rows, trained = results(configs[name])
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-4)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-4)
    assert min(norms) > 0.5  # clipping is at work
    for parameter, value in weights.items():
        torch.testing.assert_close(trained[parameter], value, rtol=1e-4, atol=2e-5)


def test_no_worker_holds_the_whole_model_while_it_is_loaded(float32):
    (_, _, weights), _, gathered = float32
    largest = max(weight.numel() for weight in weights.values())
    assert gathered == [largest] * 2  # one layer at a time


def test_options_resume_exactly(float32, tmp_path):
    names = ["stage 0", "stage 1", "stage 3, all on the CPU"]
    whole = {name: float32[1][name] for name in names}
    resumed = {name: variant(config, tmp_path / name) for name, config in whole.items()}
    for config in resumed.values():
        shutil.rmtree(RunDir(config.run_dir).model)
        shutil.rmtree(RunDir(config.run_dir).root / "checkpoints" / "4")
    launch(list(resumed.values()), workers=2)
    for name in names:
        (_, ours), (_, theirs) = results(resumed[name]), results(whole[name])
        assert all(torch.equal(ours[weight], theirs[weight]) for weight in theirs), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_updates_are_those_of_float32_masters(bfloat16, stage):
    """Most single steps are too small for bfloat16: without masters the weights would stand still.

    A norm may be off by 4 %: the plain loop's own norms change by up to 2.6 % when the same pairs are packed
    into other micro-batches, since bfloat16 then rounds other sums.
    """
    base, (_, norms, weights), found = bfloat16
    rows, trained = found[stage]
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=0.04)
    path, error = (
        math.sqrt(sum((weights[name] - other[name]).double().square().sum().item() for name in weights))
        for other in (base, trained)
    )
    assert error < 0.3 * path  # not zero: where two float32 sums round to different bfloat16


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory, tiny_chat):
    folder = tmp_path_factory.mktemp("bfloat16")
    base = scored(
        folder, tiny_chat, "bfloat16", max_steps=12, lr_scheduler_type="constant", learning_rate=2e-4
    )
    configs = {stage: variant(base, folder / str(stage), zero_stage=stage) for stage in (3, 2, 1)}
    launch(list(configs.values()))
    start = load_model(Path(base.model.name_or_path), base.model).state_dict()
    return start, plain_loop(base), {stage: results(config) for stage, config in configs.items()}


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"zero_stage": 0, "offload": "cpu"}, "offload=cpu requires zero_stage=1, 2 or 3"),
        ({"zero_stage": 2, "offload": "cpu", "offload_parameters": True}, "requires zero_stage=3"),
        ({"offload_parameters": True}, "requires zero_stage=3 and offload"),
        ({"offload": "nvme"}, "offload=nvme requires zero_stage=3 and nvme_path"),
        ({"zero_stage": 0}, "train.zero_stage=0 requires model.dtype=float32"),
    ],
)
def test_options_that_do_not_go_together_are_refused(train, said):
    values = {"run_dir": "r", "model": {"name_or_path": "m"}, "data": {"path": "p"}, "train": train}
    with pytest.raises(UserError, match=said):
        parse_config(values, "here")
