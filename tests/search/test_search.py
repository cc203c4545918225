"""The search as data: space, suggestions, objective, early stopping, winner; a sweep's folder."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.contour import ContourSet
from scipy.spatial import ConvexHull

from bdpo.config import load_config, parse_config
from bdpo.config.derive import trial_config
from bdpo.errors import UserError
from bdpo.evaluation.measures import SCORE_SCHEMA, summarise
from bdpo.method.losses import METHODS
from bdpo.reports.page import write_figure
from bdpo.reports.search import pareto_front, search_figures
from bdpo.search.space import check_space, number_of_trials
from bdpo.search.suggest import suggest
from bdpo.search.sweep import Sweep
from bdpo.search.trials import (
    Rung,
    Trial,
    asha_promotes,
    check_rungs,
    end_of,
    is_promoted,
    results_table,
    rung_steps,
    winner,
)
from bdpo.storage.run_dir import RunDir
from bdpo.variants.ends import Cause, End, Failure
from bdpo.variants.objective import InvalidEvaluation, check_measured, check_measures, measure
from tests.support.score_rows import row, xrow
from tests.support.sweeps import ALPHA, BETA, configured, measured

NAN = Failure(End.FAILED, "FloatingPointError: NaN", Cause.NOT_FINITE)
NO_MEMORY = Failure(End.FAILED, "OutOfMemoryError: of CUDA")


def trial(number, *rungs, params=None, failure=None, before=()):
    """`rungs`: (safety, compliance, when); `before`: numbers of the trials that were there before it."""
    names = [f"{other:04d}" for other in before]
    reached = [Rung(8 * (i + 1), measured(s, c), when, before=names) for i, (s, c, when) in enumerate(rungs)]
    return Trial(f"{number:04d}", params or {"method.alpha": 1.0 + number / 8}, reached, failure)


class TestSpace:
    def test_what_may_be_searched_is_accepted(self):
        space = {"method.alpha": ALPHA, "train.num_train_epochs": {"min": 1, "max": 3}}
        check_space(configured(space=space | {"method.balance": ["ratio", "none"]}))

    @pytest.mark.parametrize(
        ("space", "named"),
        [
            ({"method.alhpa": ALPHA}, "unknown key method.alhpa; did you mean method.alpha?"),
            ({"alpha": [1.0]}, "unknown key alpha"),
            ({"method.alpha": {"min": -1, "max": 2}}, "key method.alpha: Input should be greater than 0"),
            ({"method.balance": ["ratio", "fair"]}, "key method.balance"),
            ({"method.balance": {"min": 0, "max": 1}}, "key method.balance"),
            ({"train.num_train_epochs": {"min": 0.5, "max": 2}}, "key train.num_train_epochs"),
            ({"train.workers": [1, 2]}, "train.workers is not searched"),
            ({"data.max_length": [4096]}, "data.max_length is not searched"),
            ({"seed": [1, 2]}, "seed is not searched"),
            ({"train.lora.q": [8]}, "unknown key train.lora.q"),
            ({"train.lora.r": {"min": 0.5, "max": 8}}, "key train.lora.r"),
            ({"train.learning_rate.x": [8]}, "train.learning_rate.x: learning_rate is not a section"),
        ],
    )
    def test_what_may_not_is_named(self, space, named):
        with pytest.raises(UserError) as refused:
            check_space(configured(space=space))
        assert named in str(refused.value)
        assert "\n" not in str(refused.value)

    def test_the_best_model_instead_of_the_last_is_refused(self):
        values = configured().model_dump()
        values["train"] |= {
            "eval_fraction": 0.1,
            "metric_for_best_model": "loss",
            "load_best_model_at_end": True,
        }
        space = {"train.load_best_model_at_end": [False, True]}
        searched = values | {"train": values["train"] | {"load_best_model_at_end": False}}
        searched["tune"] = searched["tune"] | {"space": space}
        for config in (values, searched):
            with pytest.raises(UserError, match=r"^train\.load_best_model_at_end: .*; set it false$"):
                check_space(parse_config(config, "test"))

    @pytest.mark.parametrize(
        ("tune", "named"),
        [
            ({"space": {}}, "tune.space"),
            ({"space": {"method.alpha": []}}, "tune.space.method.alpha"),
            ({"space": {"method.alpha": {"min": 3, "max": 1}}}, "expects min < max"),
            ({"space": {"method.alpha": {"min": 0, "max": 1, "log": True}}}, "log requires min > 0"),
            ({"rungs": [0.5, 0.25, 1.0]}, "tune.rungs"),
            ({"rungs": [0.5]}, "tune.rungs"),
            ({"searcher": "grid"}, "searcher=grid requires lists"),
        ],
    )
    def test_empty_and_inverted_is_refused(self, tune, named):
        with pytest.raises(UserError, match=named):
            configured(**tune)

    def test_overrides_reach_into_the_space(self, tmp_path):
        file = tmp_path / "c.yaml"
        file.write_text(configured().to_yaml())
        space = load_config(file, ["tune.space.method.beta=[0.1, 0.2]"]).tune.space
        assert list(space) == ["method.alpha", "method.beta"]
        assert space["method.beta"] == [0.1, 0.2]

    @pytest.mark.parametrize("key", ["metric", "constraint"])
    @pytest.mark.parametrize("path", ["strongreject.safty", "wrapped.safety", "safety"])
    def test_a_measure_that_there_is_not(self, key, path):
        with pytest.raises(UserError, match=rf"tune.{key}={path}: .*strongreject.safety"):
            check_measures(configured(**{key: path}))
        check_measures(configured())

    @pytest.mark.parametrize("key", ["metric", "constraint"])
    @pytest.mark.parametrize(
        "path", ["strongreject.jailbroken_rate", "xstest.full_refusal", "xstest.partial_refusal"]
    )
    def test_a_measure_of_which_more_is_not_better(self, key, path):
        with pytest.raises(UserError, match=rf"tune.{key}={path}: more of it is not better; requires one of"):
            check_measures(configured(**{key: path}))
        check_measures(configured(metric="strongreject.safe_rate", constraint="xstest.unsafe_refusal"))

    @pytest.mark.parametrize(
        ("run", "params", "beta"),
        [
            ({"name": "dpo"}, {"method.name": "simpo"}, 2.0),
            ({"name": "simpo"}, {"method.name": "dpo"}, 0.1),
            ({"name": "dpo", "beta": 0.3}, {"method.name": "cpo"}, 0.3),
            ({"name": "dpo"}, {"method.name": "simpo", "method.beta": 0.7}, 0.7),
            ({"name": "bdpo", "beta": 0.3}, {"method.alpha": 2.0}, 0.3),
        ],
    )
    def test_a_trial_with_another_method_has_the_beta_of_its_kind(self, run, params, beta):
        config = parse_config(configured().model_dump() | {"method": run}, "test")
        assert trial_config(config, params, "r").method.beta == beta

    def test_a_trial_with_another_method_has_the_keys_of_that_method_alone(self):
        config = parse_config(configured().model_dump() | {"method": {"alpha": 2.5, "beta": 0.3}}, "test")
        params = {"method.name": "cdpo", "method.label_smoothing": 0.2, "method.alpha": 1.0}
        assert trial_config(config, params, "r").method == METHODS["cdpo"](beta=0.3, label_smoothing=0.2)
        assert trial_config(config, {"method.name": "dpo_sf"}, "r").method == METHODS["dpo_sf"](
            alpha=2.5, beta=0.3
        )

    def test_a_space_of_several_methods_has_the_keys_of_each(self):
        keys = {"method.alpha": ALPHA, "method.simpo_gamma": [0.3, 0.5]}
        check_space(configured(space={"method.name": ["bdpo", "simpo"], **keys}))
        for names in (["bdpo", "dpo"], ["dpo"]):
            with pytest.raises(UserError, match=r"method\.name=bdpo has no key simpo_gamma"):
                check_space(configured(space={"method.name": names, **keys}))
        with pytest.raises(UserError, match=r"key method.simpo_gamma: .*, got -1"):
            check_space(configured(space={"method.name": ["simpo"], "method.simpo_gamma": [-1]}))

    def test_a_trial_is_the_config_with_its_parameters_and_nothing_else(self):
        config = configured()
        params = {"method.alpha": 2.5, "train.max_steps": 7, "method.balance": "none"}
        made = trial_config(config, params, "elsewhere").model_dump()
        expected = config.model_dump() | {"run_dir": "elsewhere"}
        expected["method"] |= {"alpha": 2.5, "balance": "none"}
        expected["train"] |= {"max_steps": 7}
        assert made == expected

    def test_a_section_that_is_not_set_is_made(self):
        config = configured()
        assert config.train.lora is None
        trial = trial_config(config, {"train.lora.r": 8, "train.lora.alpha": 4}, "r")
        assert (trial.train.lora.r, trial.train.lora.alpha, trial.train.lora.dropout) == (8, 4, 0)
        assert trial.train.model_dump(exclude={"lora"}) == config.train.model_dump(exclude={"lora"})


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
            seen = (alpha / 3, 0.99 if alpha < 2 else 0.5, float(number))
            trials.append(trial(number, seen, seen, seen, params={"method.alpha": alpha}))
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


class TestRungs:
    @given(
        st.lists(st.floats(0, 1) | st.sampled_from([0.0, 0.5]), min_size=1, max_size=20),
        st.sampled_from([2, 3, 4.0]),
    )
    def test_who_goes_on_is_what_ray_tune_decides(self, scores, factor):
        from ray.tune.schedulers.async_hyperband import _Bracket

        class Named:
            def __init__(self, name):
                self.trial_id = name

        bracket = _Bracket(1, 1, factor, 0)
        for number, score in enumerate(scores):
            theirs = bracket.on_result(Named(str(number)), 1, score)
            assert (theirs == "CONTINUE") == asha_promotes(score, scores[:number], factor)

    @given(st.integers(1, 10_000), st.lists(st.integers(1, 99), unique=True, max_size=4))
    def test_steps(self, total, percents):
        shares = [*sorted(percent / 100 for percent in percents), 1.0]
        exact = [math.ceil(round(share * 100) * total / 100) for share in shares]
        if len(set(exact)) == len(exact):
            assert rung_steps(shares, total) == exact
        else:
            with pytest.raises(UserError, match=r"tune\.rungs"):
                rung_steps(shares, total)

    def test_rungs_that_some_trial_cannot_have_are_refused_for_all(self):
        config = configured(space={"train.max_steps": {"min": 3, "max": 9}}, rungs=[0.5, 0.6, 1.0])
        with pytest.raises(UserError, match=r"of 3 steps these are \[2, 2, 3\]"):
            check_rungs(config, 640)
        check_rungs(configured(space={"train.max_steps": {"min": 5, "max": 9}}, rungs=[0.5, 1.0]), 640)

    def test_who_was_there_decides_and_neither_a_clock_nor_the_order_of_reading(self):
        tune = configured().tune
        trials = [
            trial(0, (0.5, 1, 12.0)),
            trial(1, (0.4, 1, 10.0), before=[0]),
            trial(2, (0.45, 1, 11.0), before=[0, 1]),
        ]
        for order in (trials, trials[::-1]):
            # the first is always promoted; 0.4 < median(0.5); 0.45 >= median(0.5, 0.4)
            assert [is_promoted(t, order, tune) for t in trials] == [True, False, True]
            assert [end_of(t, order, tune) for t in trials] == ["open", "stopped", "open"]

    def test_a_completed_trial_stays_completed(self):
        tune = configured().tune
        best = trial(0, *[(0.9, 1, float(t)) for t in range(3)])
        worst = trial(1, *[(0.1, 1, float(t)) for t in range(5, 8)], failure=NAN)
        assert [end_of(t, [best, worst], tune) for t in (best, worst)] == ["completed", "completed"]


def benchmark_rows(harms, refusals):
    strongreject = [
        row(n, harm, failure=None if harm is not None else "timeout") for n, harm in enumerate(harms)
    ]
    return strongreject + [xrow(n, refused, "benign", True) for n, refused in enumerate(refusals)]


def table(rows):
    return pa.Table.from_pylist(rows, schema=SCORE_SCHEMA)


class TestObjective:
    def test_is_safety_within_the_bound_and_how_far_off_it_outside(self):
        tune = configured(max_over_refusal=0.2).tune
        base = table(benchmark_rows([1.0] * 4, [False] * 9 + [True]))
        good = measure(tune, table(benchmark_rows([0.0, 0.5, 0.25, 0.0], [False] * 7 + [True] * 3)), base)
        assert good.objective.known == pytest.approx(1 - 0.75 / 4)
        assert good.violation == pytest.approx(0.9 - 0.2 - 0.7)
        assert good.score == good.objective.known
        mute = measure(tune, table(benchmark_rows([0.0] * 4, [True] * 10)), base)
        assert mute.objective.known == 1
        assert mute.score == pytest.approx(-(0.9 - 0.2 - 0.0))
        assert mute.score < good.score

    def test_the_base_is_measured_on_the_same_prompts(self):
        tune = configured().tune
        base = table(benchmark_rows([1.0] * 4, [True, True, False, False]))
        first_two = table(benchmark_rows([0.0], [False, False]))
        assert measure(tune, first_two, base).base == 0.0

    def test_an_invalid_evaluation_is_no_score(self):
        tune = configured().tune
        base = table(benchmark_rows([1.0] * 4, [False] * 4))
        with pytest.raises(InvalidEvaluation, match="strongreject is invalid, 1 of 4 unjudged"):
            measure(tune, table(benchmark_rows([0.0, 0.0, 0.0, None], [False] * 4)), base)
        with pytest.raises(InvalidEvaluation):
            measure(tune, table([]), base)

    def test_prompts_that_do_not_measure_the_objective_are_refused_before_any_trial(self):
        tune = configured().tune
        rows = benchmark_rows([1.0, None, 1.0, 1.0] + 96 * [1.0], [False] * 4)
        base, items = table(rows), [row["item_id"] for row in rows]
        check_measured(tune, base, items, "all")
        with pytest.raises(UserError, match=r"^the first 4: xstest.compliance: no prompt"):
            check_measured(
                configured(metric="strongreject.safety").tune,
                table([r | {"should_comply": False} if r["benchmark"] == "xstest" else r for r in rows]),
                items,
                "the first 4",
            )
        # of all 1 verdict in 100 is missing, of the first four 1 in 4
        few = items[:4] + items[-4:]
        with pytest.raises(UserError, match=r"^few: .*strongreject is invalid, 1 of 4 unjudged"):
            check_measured(tune, base, few, "few")

    def test_the_winner_is_feasible_safest_then_most_compliant_then_first(self):
        tune = configured().tune

        def done(number, safety, compliance):
            return trial(number, *[(safety, compliance, float(number))] * 3)

        refuses_all, stopped = done(0, 1.0, 0.2), trial(1, (0.99, 1.0, 0.0))
        a, b, c = done(2, 0.8, 0.96), done(3, 0.8, 0.98), done(4, 0.8, 0.98)
        assert winner([refuses_all, stopped, a, b, c], tune) is b
        assert winner([refuses_all, stopped], tune) is None


class TestResults:
    BASE = summarise([row(1, 1.0), xrow(1, False, "ducks", True)])

    @pytest.fixture
    def trials(self):
        rng = np.random.default_rng(0)
        done = [
            trial(
                n,
                *[(0.3 + 0.08 * n, 1 - 0.02 * n, 10.0 * n + r) for r in range(3)],
                params={"method.alpha": 0.5 + n / 4, "method.beta": float(0.02 * 25 ** rng.random())},
            )
            for n in range(7)
        ]
        failed = trial(7, params={"method.alpha": 3.0, "method.beta": 0.5}, failure=NAN)
        return [*done, failed]

    def test_a_row_a_trial(self, trials):
        tune = configured().tune
        rows = results_table(trials, tune).to_pylist()
        assert [r["trial"] for r in rows] == [t.name for t in trials]
        assert [r["winner"] for r in rows].index(True) == 2  # of those with compliance 0.95 and more
        assert rows[7]["status"] == "failed"
        assert rows[7]["error"] == NAN.error
        assert rows[7]["objective"] is None
        assert rows[3]["objective"] == pytest.approx(0.3 + 0.08 * 3)
        assert [r["method.alpha"] for r in rows] == [t.params["method.alpha"] for t in trials]

    @pytest.mark.parametrize("space", [{"method.alpha": ALPHA, "method.beta": BETA}, {"method.alpha": ALPHA}])
    def test_figures(self, trials, tmp_path, space):
        tune = configured(space=space).tune
        figures = search_figures(results_table(trials, tune), tune, self.BASE)
        assert set(figures) == {"space", "front", "progress"}
        for name, figure in figures.items():
            for suffix in ("png", "pdf"):
                write_figure(figure, tmp_path / f"{name}.{suffix}")
                assert (tmp_path / f"{name}.{suffix}").stat().st_size > 5000

    def test_the_map_is_linear_in_the_scale_of_its_axes_and_no_rate_is_below_0(self):
        """No vertex of the surface lies outside the hull of the trials, as they lie on the paper."""
        rng = np.random.default_rng(0)
        flat = np.stack([rng.uniform(0.5, 3, 9), rng.uniform(np.log(0.02), np.log(0.5), 9)], axis=1)
        trials = [
            trial(n, *[(0.004 * n, 1, 0.0)] * 3, params={"method.alpha": a, "method.beta": math.exp(b)})
            for n, (a, b) in enumerate(flat.tolist())
        ]
        tune = configured().tune
        figure = search_figures(results_table(trials, tune), tune, self.BASE)["space"]
        axes, bar = figure.axes
        assert bar.get_ylim() == (0, 100)
        [surface] = [each for each in axes.collections if isinstance(each, ContourSet)]
        drawn = np.concatenate([path.vertices for path in surface.get_paths()])
        hull = ConvexHull(flat).equations
        outside = hull[:, :2] @ np.stack([drawn[:, 0], np.log(drawn[:, 1])]) + hull[:, 2:]
        assert outside.max() < 0.01

    def test_figures_of_nothing_and_of_one(self, trials):
        tune = configured().tune
        assert not search_figures(results_table(trials[7:], tune), tune, self.BASE)
        assert "front" in search_figures(results_table(trials[:1], tune), tune, self.BASE)

    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
    def test_pareto_front(self, points):
        front = {points[i] for i in pareto_front(points)}
        for p in points:
            beaten = any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)
            assert (p in front) == (not beaten)


class TestSweepFolder:
    """A trial is simulated: what it shows is a function of its parameters and the step."""

    @staticmethod
    def sweep(folder, **tune):
        config = configured(num_samples=6, rungs=[0.5, 1.0], **tune)
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
