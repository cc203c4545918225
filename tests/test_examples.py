"""The examples run, and give the numbers of the pipeline."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from trl import DPOConfig

import bdpo
from bdpo.models.logps import LogpsModel
from bdpo.scoring.scores import read_scores
from bdpo.training.pairs import TrainingPairs
from examples.trl_bdpo import BdpoTrainer, main
from tests.support.helpers import invented_pairs, save_model, tiny_config, tiny_qwen2, write_jsonl
from tests.support.scored_run import scored_run

METHOD = {"alpha": 1.7, "beta": 0.2}

LENGTHS = {"max_length": 128, "max_prompt_length": 96}


def trl_trainer(tmp_path, chat, policy, rows, **settings):
    """The example's trainer around a policy, its data scored by a reference of its own."""
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    data = Dataset.from_dict(bdpo.score_pairs(tiny_qwen2(), tokenizer, rows, **LENGTHS).columns())
    arguments = DPOConfig(
        str(tmp_path / "trl"),
        beta=METHOD["beta"],
        max_length=LENGTHS["max_length"],
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        **settings,
    )
    return BdpoTrainer(
        policy, arguments, alpha=METHOD["alpha"], train_dataset=data, processing_class=tokenizer
    )


def test_the_loss_in_trl_is_that_of_our_training_on_the_same_batch(tmp_path, tiny_chat):
    """Of a policy that is not the reference: the mean loss, and the gradient of every weight."""
    rows = invented_pairs(8)
    trainer = trl_trainer(tmp_path, tiny_chat, tiny_qwen2(seed=1), rows, per_device_train_batch_size=8)
    assert trainer.ref_model is None
    (batch,) = trainer.get_train_dataloader()
    theirs = trainer.compute_loss(trainer.model.train(), batch)
    theirs.backward()

    config = tiny_config(
        tmp_path / "run",
        save_model(tmp_path / "model", tiny_chat),
        write_jsonl(tmp_path / "pairs.jsonl", rows),
        method=METHOD,
    )
    run = scored_run(config)
    pairs = TrainingPairs.load(config, run, read_scores(config, run))
    policy = tiny_qwen2(seed=1)
    output = config.method.loss(pairs.packed(list(range(8))).logps(LogpsModel(policy, 128)))
    ours = output.loss.mean()
    ours.backward()
    assert abs(ours.item() - torch.tensor(2.0).log().item()) > 0.01
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    gradients = {name: weight.grad for name, weight in trainer.model.named_parameters()}
    for name, weight in policy.named_parameters():
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-3, atol=1e-5)


def test_the_first_loss_of_the_reference_itself_is_ln_2(tmp_path, tiny_chat):
    """So the token ids that TRL trains on are those that were scored."""
    trainer = trl_trainer(tmp_path, tiny_chat, tiny_qwen2(), invented_pairs(4), per_device_train_batch_size=4)
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss, torch.tensor(2.0).log(), rtol=1e-4, atol=1e-5)


def test_the_script_trains_a_model(tmp_path, tiny_chat, capsys):
    folder = save_model(tmp_path / "model", tiny_chat)
    data = write_jsonl(tmp_path / "pairs.jsonl", invented_pairs(8))
    out = tmp_path / "out"
    main(
        [
            "--model",
            str(folder),
            "--data",
            str(data),
            "--out",
            str(out),
            "--max-length",
            "128",
            "--steps",
            "2",
        ]
    )
    before, after = (load_file(each / "model.safetensors") for each in (folder, out))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    state = next(out.glob("checkpoint-2/trainer_state.json"))
    assert json.loads(state.read_text())["global_step"] == 2


def test_columns_of_the_scores_make_a_data_set(tiny_chat):
    scores = bdpo.score_pairs(tiny_qwen2(), tiny_chat.tokenizer, invented_pairs(3), **LENGTHS)
    data = Dataset.from_dict(scores.columns())
    assert len(data) == 3
    assert [len(ids) for ids in data["chosen_ids"]] == scores.chosen_tokens.tolist()
    assert data["mi_chosen"] == pytest.approx(scores.mi_chosen.tolist())
