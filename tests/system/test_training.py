"""Trainings as commands on a cluster of several nodes: failures without retry, checkpoints that are kept."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.support.killed_training import checkpoints, kill_training, rows, score_and_train_without_ray


@pytest.fixture(scope="module")
def scored(training_inputs, training_nodes):
    """A run folder with scores."""
    command = training_nodes.command("score", training_inputs / "config.yaml", training_inputs / "scored")
    output, _ = command.communicate()
    assert command.returncode == 0, output
    return training_inputs / "scored"


def kept(run):
    """Steps of the checkpoints that are kept."""
    return sorted(json.loads((folder / "part-0.json").read_text())["step"] for folder in checkpoints(run))


class TestOneCommand:
    """What a command says of checkpoints, of failures, of itself."""

    def train(self, training_nodes, training_inputs, run, *overrides):
        command = training_nodes.command("train", training_inputs / "config.yaml", run, *overrides)
        output, _ = command.communicate()
        return command.returncode, output

    def test_failures_that_every_retry_would_meet_end_the_run_at_once(
        self, scored, training_inputs, training_nodes, tmp_path
    ):
        """The second step of such a learning rate has no finite loss."""
        shutil.copytree(scored, tmp_path / "run")
        code, output = self.train(
            training_nodes, training_inputs, tmp_path / "run", "train.learning_rate=1e30"
        )
        assert code == 1
        assert "FloatingPointError: the " in output.splitlines()[-1]
        assert "is not finite: pairs " in output.splitlines()[-1]
        assert not rows(tmp_path / "run", "train/recoveries.jsonl")  # no second attempt

    def test_the_best_and_the_last_checkpoint_are_kept_and_one_that_is_lost_is_said(
        self, scored, training_inputs, training_nodes, tmp_path
    ):
        """The best is that of the greatest held-out loss here, so that it is not the last."""
        run, snapshot = tmp_path / "run", tmp_path / "run/train/ray/checkpoint_manager_snapshot.json"
        best = "train.eval_fraction=0.2", "train.eval_steps=2", "train.metric_for_best_model=loss"
        overrides = *best, "train.greater_is_better=true", "train.save_total_limit=1"
        shutil.copytree(scored, run)
        code, output = self.train(training_nodes, training_inputs, run, *overrides)
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
        code, output = self.train(training_nodes, training_inputs, run, *overrides)
        assert code == 0, output
        assert "checkpoint_half is not used: state/" in " ".join(output.split())
        assert f"resumes from step {best_step} with 2 workers, {12 - best_step} steps are repeated" in output
        assert kept(run) == [best_step, 12]
        assert (run / "model" / "model.safetensors").read_bytes() == weights
        manifest = json.loads((run / "train" / "manifest.json").read_text())
        assert [note.get("step") for note in manifest["recoveries"]] == [None, best_step]

        (run / "train" / "manifest.json").unlink()
        shutil.rmtree(run / "train" / "ray")
        code, output = self.train(training_nodes, training_inputs, run, *overrides)
        assert code == 2
        assert output.splitlines()[-1].startswith(
            "error: there is no intact checkpoint to resume from (all are gone)"
        )

    def test_more_workers_than_the_cluster_has(self, scored, training_inputs, training_nodes, tmp_path):
        shutil.copytree(scored, tmp_path / "run")
        code, output = self.train(training_nodes, training_inputs, tmp_path / "run", "train.workers=999")
        assert code == 2
        assert "999 workers x 1 CPU do not fit" in output.splitlines()[-1]


def test_a_dead_controller_and_a_worker_that_stands_still_cost_steps_alone(
    training_inputs, training_nodes, tmp_path
):
    """`kill_training` itself compares weights and metrics with those of an undisturbed training."""
    kills = [("controller", "step"), ("stop", "step")]
    settings = training_inputs / "config.yaml"
    score_and_train_without_ray(settings, tmp_path)
    account = kill_training(training_nodes, settings, tmp_path, kills, 0, ["train.stall_seconds=5"])
    assert len(account.kills) == account.recovered == 2
    assert account.partial == 0
