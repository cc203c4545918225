"""What may be searched, and the config of a trial."""

from __future__ import annotations

import pytest

from bdpo.config import load_config, parse_config
from bdpo.config.derive import trial_config
from bdpo.errors import UserError
from bdpo.method.losses import METHODS
from bdpo.search.space import check_space, product_keys
from bdpo.variants.objective import check_measures
from tests.support.sweeps import ALPHA, configured


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
            "save_steps": 100,
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

    def test_values_that_do_not_go_together_are_refused_in_a_grid(self):
        space = {"train.zero_stage": [0, 1], "train.offload": ["cpu"]}
        values = configured(space=space, searcher="grid").model_dump()
        values["model"]["dtype"] = "float32"  # in which stage 0 can train
        with pytest.raises(UserError, match="offload=cpu requires zero_stage=1, 2 or 3"):
            check_space(parse_config(values, "test"))

    def test_a_grid_whose_sections_do_not_go_together_is_refused_in_a_line_without_gaps(self):
        space = {"train.zero_stage": [0, 1], "train.learning_rate": [1e-5]}
        values = configured(space=space, searcher="grid").model_dump()
        values["model"]["dtype"] = "bfloat16"
        with pytest.raises(
            UserError, match=r"^tune\.space: train\.zero_stage=0 requires model\.dtype=float32"
        ):
            check_space(parse_config(values, "test"))

    def test_keys_are_named_as_a_product_if_both_are_searched(self):
        keys = {"method.alpha": ALPHA, "method.beta": [0.1, 0.2]}
        assert product_keys(configured(space=keys)) == ["method.alpha", "method.beta"]
        assert product_keys(configured(space={"method.beta": [0.1, 0.2]})) == []

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
