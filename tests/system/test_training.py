"""Trainings as commands on a cluster of several nodes: failures without retry, checkpoints that are kept."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.support.helpers import invented_pairs, save_model, tiny_config, write_jsonl
from tests.support.killed_training import Nodes, checkpoints, rows

TRAIN = {"workers": 2, "save_steps": 2, "num_train_epochs": 4}  # 12 steps


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_chat):
    folder = tmp_path_factory.mktemp("inputs")
    model = save_model(folder / "model", tiny_chat)
    data = write_jsonl(folder / "pairs.jsonl", invented_pairs(22))
    (folder / "config.yaml").write_text(tiny_config(folder / "run", model, data, train=TRAIN).to_yaml())
    return folder


@pytest.fixture(scope="module")
def nodes():
    with Nodes(workers=2) as nodes:
        yield nodes


def kept(run):
    """Steps of the checkpoints that are kept."""
    return sorted(json.loads((folder / "part-0.json").read_text())["step"] for folder in checkpoints(run))


@pytest.mark.usefixtures("account")
class TestOneCommand:
    """What a command says of checkpoints, of failures, of itself."""

    def train(self, nodes, inputs, run, *overrides):
        command = nodes.command("train", inputs / "config.yaml", run, *overrides)
        output, _ = command.communicate()
        return command.returncode, output

    def test_failures_that_every_retry_would_meet_end_the_run_at_once(self, inputs, nodes, tmp_path):
        """The second step of such a learning rate has no finite loss."""
        shutil.copytree(inputs / "scored", tmp_path / "run")
        code, output = self.train(nodes, inputs, tmp_path / "run", "train.learning_rate=1e30")
        assert code == 1
        assert "FloatingPointError: the " in output.splitlines()[-1]
        assert "is not finite: pairs " in output.splitlines()[-1]
        assert not rows(tmp_path / "run", "train/recoveries.jsonl")  # no second attempt

    def test_the_best_and_the_last_checkpoint_are_kept_and_one_that_is_lost_is_said(
        self, inputs, nodes, tmp_path
    ):
        """The best is that of the greatest held-out loss here, so that it is not the last."""
        run, snapshot = tmp_path / "run", tmp_path / "run/train/ray/checkpoint_manager_snapshot.json"
        best = "train.eval_fraction=0.2", "train.eval_steps=2", "train.metric_for_best_model=loss"
        overrides = *best, "train.greater_is_better=true", "train.save_total_limit=1"
        shutil.copytree(inputs / "scored", run)
        code, output = self.train(nodes, inputs, run, *overrides)
        assert code == 0, output
        best_step = max(rows(run)[1::2], key=lambda row: row["eval_loss"])["step"]
        assert kept(run) == [best_step, 12]
        weights = (run / "model" / "model.safetensors").read_bytes()

        best, last = sorted(checkpoints(run))
        (run / "train" / "manifest.json").unlink()
        shutil.rmtree(last)
        shutil.copytree(best, best.with_name("checkpoint_half"))
        next(best.with_name("checkpoint_half").rglob("*_optim_states.pt")).unlink()
        snapshot.write_text(snapshot.read_text()[:100])
        code, output = self.train(nodes, inputs, run, *overrides)
        assert code == 0, output
        assert "checkpoint_half is not used: state/" in " ".join(output.split())
        assert f"resumes from step {best_step}, {12 - best_step} steps are repeated" in output
        assert kept(run) == [best_step, 12]
        assert (run / "model" / "model.safetensors").read_bytes() == weights
        manifest = json.loads((run / "train" / "manifest.json").read_text())
        assert [note.get("step") for note in manifest["recoveries"]] == [None, best_step]

        (run / "train" / "manifest.json").unlink()
        shutil.rmtree(run / "train" / "ray")
        code, output = self.train(nodes, inputs, run, *overrides)
        assert code == 2
        assert output.splitlines()[-1].startswith(
            "error: there is no intact checkpoint to resume from (all are gone)"
        )

    def test_more_workers_than_the_cluster_has(self, inputs, nodes, tmp_path):
        shutil.copytree(inputs / "scored", tmp_path / "run")
        code, output = self.train(nodes, inputs, tmp_path / "run", "train.workers=999")
        assert code == 2
        assert "999 workers x 1 CPU do not fit" in output.splitlines()[-1]
