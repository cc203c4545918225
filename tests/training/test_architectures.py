"""One step of two ZeRO-3 workers with held-out pairs, of one architecture of each kind, against autograd.

All of them, in half an hour: `BDPO_TEST_ARCHITECTURES=all pytest tests/training/test_architectures.py`; some
of them: `BDPO_TEST_ARCHITECTURES=bloom,mpt`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from bdpo.data.pairs import read_pairs
from bdpo.models.loading import load_model
from bdpo.models.row_layout import SHARED_ROW_MODELS
from bdpo.models.tokenizer import EncodedPair
from bdpo.scoring.reference import ReferenceScorer
from bdpo.storage.run_dir import RunDir
from bdpo.training.batches import TrainingPlan
from bdpo.training.pairs import TrainingPairs
from tests.support.architectures import NOT_TRAINED, OWN_LOGITS, PLAIN_ROWS, tiny
from tests.support.helpers import groups_in_lists, invented_pairs, tiny_config, write_jsonl
from tests.support.scored_run import prepared_run
from tests.support.training import errors, launch, metrics, weights

pytestmark = [pytest.mark.long, pytest.mark.system]

EACH_KIND = ["cohere", "falcon", "gemma2", "gpt2", "llama", "mamba", "mixtral", "opt", "starcoder2"]

EVERY = sorted([*SHARED_ROW_MODELS, *PLAIN_ROWS, *OWN_LOGITS])

_ASKED = os.environ.get("BDPO_TEST_ARCHITECTURES", ",".join(EACH_KIND))

TRAINED = EVERY if _ASKED == "all" else _ASKED.split(",")

PAIRS = 22

# Own logits would be made of one row at a time, were the forwards not counted on.
FAULT = "from bdpo.models import logps; logps.CHUNK_ELEMENTS = 1"


def scored(folder, chat, model_type):
    """A run folder with scores by a model with dropout in its config."""
    tiny(model_type, dropout=0.2).save_pretrained(folder / "model")
    chat.tokenizer.save_pretrained(folder / "model")
    train = {"max_steps": 1, "eval_fraction": 0.3, "zero_stage": 3, "tokens_per_micro_batch": 256}
    config = tiny_config(
        folder / "run",
        folder / "model",
        write_jsonl(folder / "pairs.jsonl", invented_pairs(PAIRS)),
        train=train | {"warmup_ratio": 0.0, "max_grad_norm": 1e9},
    )
    run = prepared_run(config)
    scores = ReferenceScorer(config, "cpu").score(read_pairs(run.pairs, 0, PAIRS))
    pq.write_table(scores, run.root / "scores.parquet")
    (run.root / "fault.py").write_text(FAULT)
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_chat):
    folder = tmp_path_factory.mktemp("runs")
    configs = {name: scored(folder / name, tiny_chat, name) for name in [*TRAINED, *NOT_TRAINED]}
    launch(list(configs.values()), workers=2, may_stop=True)
    return configs


def expected_norm(config):
    """Of B-DPO's gradient at Δ = 0, -β/2 (a_w ∇log π(y_w|x) - a_l ∇log π(y_l|x)), the mean of the batch."""
    run = RunDir(config.run_dir)
    data, _ = TrainingPairs.load(config, run, pq.read_table(run.root / "scores.parquet")).split()
    batch = TrainingPlan(data.lengths, config.train, config.seed).global_batch(0)
    pairs = [EncodedPair(*pair) for pair in groups_in_lists(data.groups[batch])]
    model = load_model(Path(config.model.name_or_path), config.model).double().eval()
    model.set_experts_implementation("eager")
    for index, pair in zip(batch, pairs, strict=True):
        weight_chosen, weight_rejected = data.known[index, 4:6].double()
        sides = ((-weight_chosen, pair.chosen), (weight_rejected, pair.rejected))
        for weight, response in sides:
            logits = model(torch.tensor([pair.prompt + response])).logits[0, len(pair.prompt) - 1 : -1]
            logp = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()
            (config.method.beta / 2 * weight * logp / len(batch)).backward()
    gradients = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
    return torch.stack(gradients).sum().sqrt().item()


@pytest.mark.parametrize("model_type", TRAINED)
def test_it_trains_a_step_by_the_gradient_of_its_own_logits(runs, model_type):
    config = runs[model_type]
    run = RunDir(config.run_dir)
    assert not errors(run.root)
    assert metrics(run) == pytest.approx([torch.tensor(2.0).log().item()], abs=1e-4)
    assert metrics(run, "grad_norm") == pytest.approx([expected_norm(config)], rel=1e-3)
    assert torch.tensor(metrics(run, "eval_loss")).isfinite().all()
    base = load_model(Path(config.model.name_or_path), config.model).state_dict()
    assert any((weight != base[name]).any() for name, weight in weights(run).items())


@pytest.mark.parametrize("model_type", NOT_TRAINED)
def test_an_architecture_that_is_random_in_training_is_refused(runs, model_type):
    messages = errors(RunDir(runs[model_type].run_dir).root)
    assert len(messages) == 2
    assert all(f"{model_type} models compute something else in training" in message for message in messages)
