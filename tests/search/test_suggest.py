"""The setting of the next trial."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bdpo.config import parse_config
from bdpo.search.space import check_space, number_of_trials
from bdpo.search.suggest import suggest
from bdpo.search.trials import (
    Trial,
    winner,
)
from tests.support.sweeps import ALPHA, BETA, NAN, configured, trial


class TestSuggestions:
    def test_a_grid_is_every_combination_once(self):
        space = {"method.alpha": [0.5, 1, 2.0], "method.balance": ["ratio", "none"]}
        config = configured(space=space, searcher="grid", num_samples=1)
        points = [tuple(suggest(config, n, []).values()) for n in range(number_of_trials(config))]
        assert points == [(a, b) for a in (0.5, 1, 2.0) for b in ("ratio", "none")]

    def test_settings_that_train_the_same_model_are_one_trial(self):
        """Alpha and beta of B-DPO count as their product."""
        space = {"method.alpha": [0.5, 1.0, 2.0], "method.beta": [0.1, 0.2, 0.4]}
        config = configured(space=space, searcher="grid", num_samples=1)
        points = [tuple(suggest(config, n, []).values()) for n in range(number_of_trials(config))]
        assert points == [(0.5, 0.1), (0.5, 0.2), (0.5, 0.4), (1.0, 0.4), (2.0, 0.4)]
        one = configured(space={"method.alpha": [1.0, 2.0], "method.beta": [0.1, 0.2]}, searcher="random")
        history = []
        for number in range(3):
            params = suggest(one, number, history)
            history.append(Trial(f"{number:04d}", params))
        products = {round(math.prod(trial.params.values()), 6) for trial in history}
        assert products == {0.1, 0.2, 0.4}

    @pytest.mark.parametrize("searcher", ["random", "optuna"])
    def test_the_first_trial_is_the_config_as_it_stands(self, searcher):
        config = configured(searcher=searcher)
        assert suggest(config, 0, []) == {
            "method.alpha": config.method.alpha,
            "method.beta": config.method.beta,
        }
        off = configured(searcher=searcher, space={"method.alpha": {"min": 2.0, "max": 3.0}})
        assert 2.0 <= suggest(off, 0, [])["method.alpha"] <= 3.0

    @pytest.mark.parametrize("searcher", ["random", "optuna"])
    def test_each_lies_in_the_space_and_is_a_function_of_the_seed(self, searcher):
        space = {"method.alpha": ALPHA, "method.beta": BETA, "train.num_train_epochs": {"min": 1, "max": 9}}
        config = configured(searcher=searcher, space=space | {"method.balance": ["ratio", "none"]})
        drawn = [suggest(config, n, []) for n in range(1, 60)]
        for params in drawn:
            assert 0.5 <= params["method.alpha"] <= 3
            assert 0.02 <= params["method.beta"] <= 0.5
            assert params["train.num_train_epochs"] in range(1, 10)
            assert params["method.balance"] in ("ratio", "none")
            check_space(configured(space={key: [value] for key, value in params.items()}))
        assert drawn == [suggest(config, n, []) for n in range(1, 60)]
        other = configured(searcher=searcher, space=space, seed=1)
        assert suggest(other, 1, [])["method.alpha"] != drawn[0]["method.alpha"]
        # log: as many below the geometric mean, 0.1, as above
        assert 15 < sum(params["method.beta"] < 0.1 for params in drawn) < 45

    @pytest.mark.parametrize("searcher", ["random", "optuna"])
    def test_keys_of_a_section_that_may_not_be_set(self, searcher):
        space = {"train.lora.r": {"min": 4, "max": 64, "log": True}, "train.lora.dropout": [0.0, 0.1]}
        unset = configured(searcher=searcher, space=space)
        check_space(unset)
        for number in range(9):
            params = suggest(unset, number, [])
            assert params["train.lora.r"] in range(4, 65)
            assert isinstance(params["train.lora.r"], int)
            assert params["train.lora.dropout"] in (0.0, 0.1)
        values = unset.model_dump()
        values["train"]["lora"] = {"r": 16, "dropout": 0.1}
        assert suggest(parse_config(values, "test"), 0, []) == {"train.lora.r": 16, "train.lora.dropout": 0.1}

    def test_tpe_moves_to_where_it_was_safe_and_away_from_where_too_much_was_refused(self):
        """Safety rises with alpha; above 2 the bound is broken. Random search would fill the range."""
        config = configured(space={"method.alpha": ALPHA}, searcher="optuna")
        trials = []
        for number in range(40):
            alpha = suggest(config, number, trials)["method.alpha"]
            early = (alpha / 3, 1.0, float(number))  # the bound is broken at the last rung alone
            last = (alpha / 3, 0.99 if alpha < 2 else 0.5, float(number))
            trials.append(trial(number, early, early, last, params={"method.alpha": alpha}))
        late = [t.params["method.alpha"] for t in trials[20:]]
        assert sum(1.5 < alpha < 2 for alpha in late) > len(late) / 2
        assert 1.8 < winner(trials, config.tune).params["method.alpha"] < 2

    def test_a_failed_trial_is_no_score_and_an_open_one_is_kept_away_from(self):
        """Without them safety falls with alpha. One was safe at 2.9 before it failed: nothing goes there."""
        config = configured(space={"method.alpha": ALPHA}, searcher="optuna")
        alphas = np.linspace(0.5, 3.0, 20)
        seen = [[(1 - alpha / 4, 1.0, 0.0)] * 3 for alpha in alphas]
        known = [
            trial(n, *s, params={"method.alpha": float(a)})
            for n, (a, s) in enumerate(zip(alphas, seen, strict=True))
        ]
        safe = [(1.0, 1.0, 0.0)] * 2
        failed = trial(20, *safe, params={"method.alpha": 2.9}, failure=NAN)
        numbers = range(21, 41)

        def suggested(*more):
            return [suggest(config, number, [*known, *more])["method.alpha"] for number in numbers]

        alone = suggested()
        assert suggested(failed) == alone
        assert suggested(trial(20, *safe, params={"method.alpha": 2.9})) != alone  # as a stopped one is not
        near = float(np.median(alone))
        open_ones = [trial(20 + n, params={"method.alpha": near + n / 1000}) for n in range(6)]
        assert sum(abs(a - near) < 0.1 for a in suggested(*open_ones)) < sum(
            abs(a - near) < 0.1 for a in alone
        )

    @pytest.mark.parametrize("searcher", ["random", "optuna"])
    def test_no_setting_is_suggested_twice_before_all_were(self, searcher):
        """Of the best so far TPE would suggest nothing else."""
        space = {"method.alpha": [0.5, 1.0, 1.5, 2.0], "method.balance": ["ratio", "softmax", "none"]}
        config = configured(searcher=searcher, space=space)
        trials = []
        for number in range(13):
            params = suggest(config, number, trials)
            seen = (1.0 if params["method.balance"] == "ratio" else 0.0, 1.0, 0.0)
            trials.append(trial(number, seen, seen, seen, params=params))
        assert len({tuple(t.params.items()) for t in trials[:12]}) == 12
        assert trials[12].params in [t.params for t in trials[:12]]
