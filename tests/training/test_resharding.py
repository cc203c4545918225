"""A training that is resumed by another number of workers ends as an undisturbed one, to rounding."""

from __future__ import annotations

import shutil
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdpo.storage.run_dir import RunDir
from bdpo.training.resharding import Share, reshard_groups, reshard_parameters
from tests.support.training import copied, launch, metrics, score, weights

LORA = {"r": 4, "dropout": 0.0, "target_modules": "all-linear"}

KINDS = {
    "ZeRO 0": {"zero_stage": 0},
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3": {"zero_stage": 3},
    "ZeRO 3, LoRA": {"zero_stage": 3, "lora": LORA},
    "ZeRO 2, LoRA": {"zero_stage": 2, "lora": LORA},
}

CHAIN = [(1, 1), (2, 3), (3, 4), (1, 5)]
"""(number of workers, step of the checkpoint from which the next ones resume), of 6 steps."""

TOLERANCE = 1e-5
"""In float32. A wrong or missing moment changes weights by a learning rate a step: 1e-3."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_chat):
    """Kind -> the undisturbed run of one worker, and the run that 1, 2, 3 and 1 workers made in turn."""
    scored = score(tmp_path_factory.mktemp("scored"), tiny_chat)
    folder, before = tmp_path_factory.mktemp("runs"), {}
    for number, (workers, _) in enumerate(CHAIN):
        configs = {}
        for kind, keys in KINDS.items():
            train = {"num_train_epochs": 2, "save_steps": 1, "learning_rate": 1e-3, **keys}
            resumed_from = [before[kind].root / "checkpoints" / str(CHAIN[number - 1][1])] if number else []
            configs[kind] = copied(scored, folder / f"{kind} {number}", resumed_from, train=train)
            if number:
                shutil.copy(before[kind].metrics, RunDir(configs[kind].run_dir).metrics)
        launch(list(configs.values()), workers)
        before = {kind: RunDir(config.run_dir) for kind, config in configs.items()}
    return {kind: (RunDir(folder / f"{kind} 0"), run) for kind, run in before.items()}


@pytest.mark.system
@pytest.mark.parametrize("kind", KINDS)
def test_1_2_3_and_1_workers_train_as_one(runs, kind):
    undisturbed, changed = runs[kind]
    assert metrics(changed, "step") == [1, 2, 3, 4, 5, 6]
    assert metrics(changed, "learning_rate") == metrics(undisturbed, "learning_rate")
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(metrics(changed, name), metrics(undisturbed, name), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(changed), weights(undisturbed), rtol=0, atol=TOLERANCE)


def padded(flat, length):
    return torch.cat([flat, flat.new_zeros(length - flat.numel())])


def states_of_groups(groups, workers):
    """The parts of all workers under ZeRO 1 and 2, written from the definition."""
    parts = []
    for rank in range(workers):
        state, weights = {}, []
        for number, (values, moments) in enumerate(groups):
            length = 2 * -(-values.numel() // (2 * workers))
            cut = slice(rank * length, (rank + 1) * length)
            weights.append(padded(values, length * workers)[cut])
            state[number] = {
                "step": torch.tensor(7.0),
                "exp_avg": padded(moments, length * workers)[cut],
            }
        base = {"state": state, "param_groups": []}
        parts.append({"single_partition_of_fp32_groups": weights, "base_optimizer_state": base})
    return parts


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 5), st.integers(1, 5))
def test_groups_that_are_cut_anew_are_those_of_the_other_number_of_workers(sizes, before, now):
    groups = [(torch.randn(size), torch.randn(size)) for size in sizes]
    old, new = states_of_groups(groups, before), states_of_groups(groups, now)
    for rank in range(now):
        lengths = [part.numel() for part in new[rank]["single_partition_of_fp32_groups"]]
        assert same(reshard_groups(old, sizes, lengths, Share(rank, now)), new[rank])


def states_of_parameters(tensors, groups, workers):
    """The parts of all workers under ZeRO 3, with the parameters in these sub-groups."""

    def flat(which, names, rank):
        parts = []
        for name in names:
            values = tensors[name][which].flatten()
            length = -(-values.numel() // workers)
            parts.append(padded(values, length * workers)[rank * length : (rank + 1) * length])
        return torch.cat(parts)

    return [
        {
            "fp32_flat_groups": [flat(0, names, rank) for names in groups],
            "optimizer_state_dict": {
                "state": {
                    number: {"step": torch.tensor(7.0), "exp_avg": flat(1, names, rank)}
                    for number, names in enumerate(groups)
                },
                "param_groups": [{"lr": 0.1, "params": list(range(len(groups)))}],
            },
        }
        for rank in range(workers)
    ]


@given(
    st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=6),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 6),
)
def test_parameters_that_are_cut_anew_may_lie_in_other_sub_groups(shapes, before, now, cut):
    tensors = {f"p{number}": torch.randn(2, prod(shape)) for number, shape in enumerate(shapes)}
    tensors = {name: [both[0], both[1]] for name, both in tensors.items()}
    names = list(tensors)
    groups = [group for group in (names[:cut], names[cut:]) if group]
    named = [{f"p{number}": torch.Size(shape) for number, shape in enumerate(shapes)}]
    named_now = [{name: named[0][name] for name in group} for group in groups]
    old, new = states_of_parameters(tensors, [names], before), states_of_parameters(tensors, groups, now)
    for rank in range(now):
        param_groups = new[rank]["optimizer_state_dict"]["param_groups"]
        found = reshard_parameters(old, named, named_now, param_groups, Share(rank, now))
        assert same(found, new[rank])
