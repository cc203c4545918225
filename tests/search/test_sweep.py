"""A sweep's folder: killed, resumed, tidied."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdpo.config import parse_config
from bdpo.errors import UserError
from bdpo.search.space import check_space
from bdpo.search.sweep import Sweep
from bdpo.storage.paths import storage_path
from bdpo.storage.run_dir import RunDir
from bdpo.variants.ends import End, Failure
from benchmarks.storage import counted_requests
from tests.support.sweeps import ALPHA, NAN, NO_MEMORY, configured, measured


class TestSweepFolder:
    """A trial is simulated: what it shows is a function of its parameters and the step."""

    @staticmethod
    def sweep(folder, **tune):
        config = configured(**{"num_samples": 6, "rungs": [0.5, 1.0]} | tune)
        return Sweep(config, RunDir(folder), {"seed": config.seed, "tune.space": str(config.tune.space)})

    @staticmethod
    def work(sweep, commits):
        """One trial after the other, as a sweep of one at a time; ends after so many commits."""
        while True:
            unfinished = sweep.open_trials()
            if not unfinished and not sweep.missing():
                return
            if not unfinished:
                sweep.suggest()
            else:
                at = unfinished[0]
                safety = min(1.0, at.params["method.alpha"] / 3 * (1 + len(at.rungs)) / 2)
                sweep.record_rung(at, 8 * (1 + len(at.rungs)), measured(safety))
            commits -= 1
            if commits == 0:
                return

    @settings(max_examples=15)
    @given(kills=st.lists(st.integers(1, 6), max_size=4))
    def test_killed_anywhere_it_ends_as_if_never_killed(self, tmp_path_factory, kills):
        whole, killed = (self.sweep(tmp_path_factory.mktemp("sweep")) for _ in range(2))
        self.work(whole, commits=-1)
        for commits in kills:
            self.work(self.sweep(killed.run.root), commits)
        self.work(self.sweep(killed.run.root), commits=-1)
        ends = [
            [(t.name, t.params, [(r.step, r.measured) for r in t.rungs], s.end_of(t)) for t in s.trials()]
            for s in (whole, killed)
        ]
        assert ends[0] == ends[1]
        assert len(ends[0]) == 6

    def test_on_object_storage_trials_are_read_many_at_a_time(self, bucket):
        """One after the other a decision of a sweep of 200 trials would wait for a thousand answers."""
        sweep = self.sweep(storage_path(f"{bucket}/run", "run_dir"), num_samples=12)
        for number in range(12):
            sweep.record_rung(sweep.suggest(), 8, measured(number / 12))
        with counted_requests() as requests:
            found = sweep.trials()
        assert [(trial.name, len(trial.rungs)) for trial in found] == [(f"{n:04d}", 1) for n in range(12)]
        # A list of the trials, then of each its parameters, its failure, a list of its rungs and the rung.
        assert len(requests.spans) == 1 + 12 * 4
        assert requests.in_a_row() < 24

    def test_a_folder_whose_process_was_killed_before_its_parameters_were_written_is_no_trial(self, tmp_path):
        sweep = self.sweep(tmp_path)
        first = sweep.suggest()
        (sweep.run.tune / "trials" / "0001").mkdir()
        assert [trial.name for trial in sweep.trials()] == [first.name]
        assert sweep.suggest().name == "0001"
        with pytest.raises(FileNotFoundError, match=r"0007: no trial"):
            sweep.trial("0007")

    def test_another_space_is_refused_by_name(self, tmp_path):
        self.sweep(tmp_path).begin()
        self.sweep(tmp_path).begin()
        with pytest.raises(UserError, match=r"made with tune\.space=.*method\.beta.*, now it is"):
            self.sweep(tmp_path, space={"method.alpha": ALPHA}).begin()

    def test_a_clock_that_is_behind_opens_no_trial_that_was_stopped(self, tmp_path, monkeypatch):
        sweep = self.sweep(tmp_path)
        clock = iter(range(1000, 0, -10))
        monkeypatch.setattr("time.time", lambda: float(next(clock)))
        for safety in (0.9, 0.2, 0.6):
            sweep.record_rung(sweep.suggest(), 8, measured(safety))
        # 0.2 < median(0.9); 0.6 >= median(0.9, 0.2)
        assert [sweep.end_of(t) for t in sweep.trials()] == ["open", "stopped", "open"]
        assert [list(t.rungs[0].before) for t in sweep.trials()] == [[], ["0000"], ["0000", "0001"]]

    def test_values_that_do_not_go_together_are_a_trial_that_cannot_be_trained(self, tmp_path):
        values = configured(space={"train.zero_stage": [0], "train.offload": ["cpu"]}).model_dump()
        values["model"]["dtype"] = "float32"
        sweep = Sweep(parse_config(values, "test"), RunDir(tmp_path), {})
        check_space(sweep.config)  # each alone is fine
        made = sweep.suggest()
        assert made.params == {"train.zero_stage": 0, "train.offload": "cpu"}
        assert [t.name for t in sweep.open_trials()] == [made.name]
        with pytest.raises(UserError, match="offload=cpu requires zero_stage"):
            sweep.config_of(made)

    def test_what_diverged_stays_failed_and_the_others_are_tried_again(self, tmp_path):
        sweep = self.sweep(tmp_path)
        nan, invalid, lost, large = (sweep.suggest() for _ in range(4))
        sweep.record_failure(nan.name, NAN)
        sweep.record_failure(invalid.name, Failure(End("invalid"), "12 of 40 unjudged"))
        sweep.record_failure(lost.name, Failure(End("lost"), "3 times, at last OSError"))
        sweep.record_failure(large.name, NO_MEMORY)
        assert [sweep.end_of(t) for t in sweep.trials()] == ["failed", "invalid", "lost", "failed"]
        assert sweep.open_trials() == []
        assert sweep.todo() == sweep.missing() + 3
        sweep.reopen()
        assert [t.name for t in sweep.open_trials()] == [invalid.name, lost.name, large.name]
        assert sweep.todo() == sweep.missing() + 3

    @pytest.mark.parametrize(
        ("failure", "kept"),
        [
            (NAN, False),
            (NO_MEMORY, True),
            (Failure(End.INVALID, "why"), True),
            (Failure(End.LOST, "why"), True),
        ],
    )
    def test_checkpoints_of_a_trial_that_is_tried_again_stay(self, tmp_path, failure, kept):
        sweep = self.sweep(tmp_path)
        folder = sweep.folder(sweep.suggest().name)
        for path in (folder.train, folder.model):
            path.mkdir(parents=True)
        sweep.record_failure("0000", failure)
        sweep.tidy("0000")
        assert (folder.train.exists(), folder.model.exists()) == (kept, kept)

    def test_checkpoints_go_when_a_trial_ends_and_the_model_when_it_cannot_win(self, tmp_path):
        sweep = self.sweep(tmp_path)
        for number, safety in enumerate((0.9, 0.2, 0.9)):
            at = sweep.suggest()
            folder = sweep.folder(at.name)
            for path in (folder.train, folder.model, folder.adapter):
                path.mkdir(parents=True)
            for step in (8, 16)[: 1 if number else 2]:
                sweep.record_rung(sweep.trial(at.name), step, measured(safety))
            sweep.tidy(at.name)
        assert [sweep.end_of(t) for t in sweep.trials()] == ["completed", "stopped", "open"]
        assert self.left(sweep) == ["model adapter", "", "train model adapter"]

    @pytest.mark.parametrize("best", [None, 1])
    def test_what_ended_with_its_driver_is_tidied_when_the_sweep_ends(self, tmp_path, best):
        """No trial was tidied when it ended. Of the completed the best keeps its model, or all do."""
        sweep = self.sweep(tmp_path)
        for safety, steps in ((0.8, 2), (0.9, 2), (0.1, 1), (0.9, 1), (0.9, 0)):
            at = sweep.suggest()
            folder = sweep.folder(at.name)
            for path in (folder.train, folder.model, folder.adapter):
                path.mkdir(parents=True)
            for step in (8, 16)[:steps]:
                sweep.record_rung(sweep.trial(at.name), step, measured(safety))
        sweep.record_failure("0003", Failure(End("lost"), "why"))
        sweep.record_failure("0004", NAN)
        trials = sweep.trials()
        assert [sweep.end_of(t) for t in trials] == ["completed", "completed", "stopped", "lost", "failed"]
        sweep.tidy_all(best and trials[best])
        first = "" if best else "model adapter"
        assert self.left(sweep) == [first, "model adapter", "", "train model adapter", ""]

    @staticmethod
    def left(sweep):
        """What each trial still has."""
        folders = [sweep.folder(t.name) for t in sweep.trials()]
        kept = ("train", "model", "adapter")
        return [" ".join(name for name in kept if getattr(f, name).exists()) for f in folders]
