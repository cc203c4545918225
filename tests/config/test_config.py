"""The configuration: precedence, refusals that name the key, and the way back from YAML."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bdpo.config import Config, load_config, parse_config, worker_range
from bdpo.config.evaluate import EvaluateConfig, JailbreakConfig, XSTestConfig
from bdpo.errors import UserError
from bdpo.method.losses import Bdpo
from bdpo.section import Section
from tests.support import ROOT

NEEDED = {"run_dir": "runs/a", "model": {"name_or_path": "m"}, "data": {"path": "p"}}

CONFIGS = sorted((ROOT / "pipelines" / "configs").glob("*.yaml"))


@pytest.fixture
def load(tmp_path):
    """load(*overrides, **sections): over a file with the needed keys and these sections."""

    def load_here(*overrides, **sections):
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump({**NEEDED, **sections}))
        return load_config(file, overrides)

    return load_here


def refusal(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_every_config_on_disk_loads(file):
    load_config(file)


def test_defaults_then_file_then_overrides(load):
    config = load("method.alpha=3", "train.workers=4", method={"alpha": 2.0, "beta": 0.2})
    assert (config.method.alpha, config.method.beta, config.train.workers) == (3.0, 0.2, 4)
    assert config.method.balance == Config.model_validate(NEEDED).method.balance


def test_the_default_of_beta_is_the_methods_and_is_saved(load):
    assert load("method.name=cpo").method.beta == 0.1
    simpo = load(method={"name": "simpo"})
    assert simpo.method.beta == 2.0
    assert yaml.safe_load(simpo.to_yaml())["method"]["beta"] == 2.0
    assert load("method.name=simpo", "method.beta=2.5").method.beta == 2.5
    assert load(method={"beta": 0.3}).method == Bdpo(beta=0.3)


def test_a_section_that_is_off_by_default_is_turned_on_by_one_of_its_keys(load):
    assert load().train.lora is None
    lora = load("train.lora.r=8").train.lora
    assert (lora.r, lora.target_modules) == (8, "all-linear")
    assert load("train.lora.target_modules=[q_proj]").train.lora.target_modules == ["q_proj"]
    assert "did you mean train.lora.dropout?" in refusal(load, "train.lora.dropuot=0.1")
    assert "key train.lora.target_modules:" in refusal(load, "train.lora.target_modules=3")


def test_overrides_are_yaml(load):
    config = load(
        "train.learning_rate=1e-6", "score.workers=[1, 4]", "data.sample={safe: 2, unsafe: 3}",
        "data.limit=null", "train.gradient_checkpointing=false", "model.revision=main",
    )  # fmt: skip
    assert config.train.learning_rate == 0.000001
    assert worker_range(config.score.workers) == (1, 4)
    assert config.data.sample == {"safe": 2, "unsafe": 3}
    assert (config.data.limit, config.train.gradient_checkpointing) == (None, False)
    assert config.model.revision == "main"


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.e-6", "1.0e-06", "0.000001"])
def test_a_number_is_a_number_in_the_file_too(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(NEEDED) + f"train: {{learning_rate: {text}}}")
    assert load_config(file).train.learning_rate == 0.000001


@pytest.mark.parametrize("empty", [{"train": None}, {"data": {"path": "p", "sample": None}}])
def test_an_override_may_fill_an_empty_section(load, empty):
    override = "train.workers=2" if "train" in empty else "data.sample.safe=2"
    config = load(override, **empty)
    assert (config.train.workers, config.data.sample) in [(2, None), (1, {"safe": 2})]


class TestRefusals:
    @pytest.mark.parametrize(
        "override",
        [
            "experiment.seeds=[0, 0]",
            "experiment.alphas=[1.0, 1.0]",
            "experiment.betas=[0.1, 0.2, 0.1]",
            "experiment.learning_rates=[0.001, 0.001]",
            "train.report_to=[wandb, wandb]",
            "evaluate.benchmarks=[xstest, xstest]",
        ],
    )
    def test_what_would_count_twice(self, load, override):
        with pytest.raises(UserError, match=f"{override.partition('=')[0]}: names something twice"):
            load(override)

    @pytest.mark.parametrize(
        ("override", "key", "meant"),
        [
            ("train.learning_rat=1", "train.learning_rat", "train.learning_rate"),
            ("trian.workers=1", "trian", "train"),
            ("evalute.limit=1", "evalute", "evaluate"),
            ("method.learning_rate=1", "method.learning_rate", "train.learning_rate"),
            ("data.balance=none", "data.balance", "method.balance"),
            ("rundir=x", "rundir", "run_dir"),
        ],
    )
    def test_unknown_key_and_the_nearest_known_one(self, load, override, key, meant):
        assert refusal(load, override).endswith(f"unknown key {key}; did you mean {meant}?")

    def test_unknown_key_is_told_before_the_key_that_is_missing_for_it(self, tmp_path):
        file = tmp_path / "run.yaml"
        values = {key: value for key, value in NEEDED.items() if key != "model"}
        file.write_text(yaml.safe_dump({**values, "modle": {"name_or_path": "m"}}))
        assert refusal(load_config, file) == f"{file}: unknown key modle; did you mean model?"

    @pytest.mark.parametrize(
        ("data", "line"),
        [
            ({"path": [{"path": "F", "weight": 0}]}, "path.0.weight: Input should be greater than 0, got 0"),
            (
                {"path": [{"path": "F", "wieght": 1}]},
                "path.0.wieght; did you mean data.path.0.weight?",
            ),
            ({"path": ["A", {"weight": 1}]}, "path.1.path is missing"),
            (
                {"path": "A", "columns": {"chosen": "r", "rejected": "r"}},
                "columns: chosen and rejected are the same column 'r' of the file",
            ),
        ],
    )
    def test_the_line_names_what_is_wrong_in_one_of_several_data_sets(self, data, line):
        values = {"run_dir": "x", "model": {"name_or_path": "m"}, "data": data}
        assert refusal(parse_config, values, "my.yaml").endswith(f"key data.{line}")

    @pytest.mark.parametrize(
        ("method", "override", "said"),
        [
            ("dpo", "method.simpo_gamma=3", "no key simpo_gamma, which belongs to simpo; its keys are beta"),
            ("simpo", "method.label_smoothing=0.1", "which belongs to cdpo and robust; its keys are beta, "),
            ("bdpo", "method.safedpo_delta=3", "no key safedpo_delta, which belongs to safedpo; its keys"),
        ],
    )
    def test_a_key_of_another_method_is_refused(self, load, method, override, said):
        message = refusal(load, override, method={"name": method})
        assert message.startswith(f"override {override.partition('=')[0]}: method.name={method} has no key ")
        assert said in message

    def test_an_override_changes_the_method_of_a_file_written_for_another(self, load, tmp_path):
        """Shared keys stay as the file has them; what is the former method's alone is left out."""
        saved = tmp_path / "saved.yaml"
        saved.write_text(load(method={"name": "bdpo", "alpha": 1.2, "sharpness": 2.0, "beta": 0.3}).to_yaml())
        dpo_sf, simpo = (load_config(saved, [f"method.name={name}"]).method for name in ("dpo_sf", "simpo"))
        assert dpo_sf.model_dump() == {
            "name": "dpo_sf", "alpha": 1.2, "beta": 0.3, "nll_weight": 0.0, "side_weight": "alpha/2",
        }  # fmt: skip
        own = {"name": "simpo", "beta": 2.0, "nll_weight": 0.0, "simpo_gamma": 0.5}
        assert simpo.model_dump() == own  # its own default
        misspelt = refusal(load, "method.name=dpo", method={"name": "bdpo", "sharpnes": 1})
        assert "sharpnes" in misspelt

    def test_the_short_form_of_a_kind_takes_further_keys(self, load):
        config = load("evaluate.judge=fitted", "evaluate.judge.path=judge.joblib")
        assert config.evaluate.judge.model_dump() == {"name": "fitted", "path": "judge.joblib"}
        config = load("evaluate.judge.path=judge.joblib", evaluate={"judge": "fitted"})
        assert config.evaluate.judge.path == "judge.joblib"
        config = load("method=dpo", "method.beta=0.2", method={"name": "bdpo", "alpha": 1.2})
        assert config.method.model_dump() == {"name": "dpo", "beta": 0.2, "nll_weight": 0.0}

    @pytest.mark.parametrize(
        ("judge", "files", "variable"),
        [
            ({"name": "string_matching"}, [], None),
            ({"name": "rubric", "base_url": "http://h/v1", "model": "m", "api_key_env": "KEY"}, [], "KEY"),
            ({"name": "finetuned", "model": "tuned"}, ["tuned"], None),
            ({"name": "wildguard", "model": "guard"}, ["guard"], None),
            ({"name": "fitted", "path": "judge.json"}, ["judge.json"], None),
        ],
    )
    def test_what_a_judge_requires_of_the_nodes(self, load, judge, files, variable):
        evaluate = load(evaluate={"judge": judge, "adapter": "lora"}).evaluate
        assert evaluate.files()[: 1 + len(files)] == ["lora", *files]
        assert evaluate.judge.key_variable == variable

    def test_the_files_of_a_section_are_those_of_the_evaluation_whatever_its_class(self):
        class OwnConfig(Section):
            def files(self):
                return ["own.csv"]

        class WithOwn(EvaluateConfig):
            own: OwnConfig = OwnConfig()

        given = WithOwn(xstest=XSTestConfig(path="x.csv"), jailbreak=JailbreakConfig(paths=["a.json"]))
        assert given.files() == ["x.csv", "a.json", "own.csv"]

    def test_a_key_that_the_kind_in_short_form_does_not_have_is_refused(self, load):
        message = refusal(load, "evaluate.judge.path=x", evaluate={"judge": "string_matching"})
        assert "evaluate.judge.name=string_matching has no key path" in message

    @pytest.mark.parametrize(("override", "key"), [("name=x", "name"), ("method.name=[dpo]", "method")])
    def test_a_name_that_chooses_no_method_is_refused(self, load, override, key):
        message = refusal(load, override, method={"name": "bdpo"})
        assert message.startswith(f"override {override.partition('=')[0]}: ")
        assert key in message

    def test_a_misspelt_key_of_a_method_is_compared_with_its_own_keys(self, load):
        assert refusal(load, "method.sharpnes=1").endswith("; did you mean method.sharpness?")
        told = refusal(load, "method.label_smothing=1", method={"name": "cdpo"})
        assert told.endswith("; did you mean method.label_smoothing?")
        assert "label_smoothing" not in refusal(load, "method.label_smothing=1")

    @pytest.mark.parametrize(
        ("override", "meant"),
        [
            ("model.dtype=bf16", "did you mean bfloat16?"),
            ("model.dtype=torch.bfloat16", "did you mean bfloat16?"),
            ("method.name=sim-po", "did you mean simpo?"),
            ("train.lr_scheduler_type=cosin", "did you mean cosine?"),
        ],
    )
    def test_a_name_that_is_none_and_the_nearest_that_is_one(self, load, override, meant):
        message = refusal(load, override)
        assert message.endswith(meant)
        assert f"key {override.partition('=')[0]}: expects one of " in message

    def test_who_made_it_is_named(self, load, tmp_path):
        file = str(tmp_path / "run.yaml")
        assert refusal(load, "seed=1", train={"workers": 0}).startswith(f"{file}: key train.workers")
        assert refusal(load, "seed=1", "train.workers=0").startswith(
            "override train.workers: key train.worke"
        )
        told = refusal(load, "train.load_best_model_at_end=true", "seed=1")
        assert told.startswith("override train.load_best_model_at_end: key train: ")

    def test_unlike_anything(self, load):
        assert refusal(load, "qqqqqq=1").endswith("unknown key qqqqqq")

    @pytest.mark.parametrize(
        ("override", "key"),
        [
            ("train.workers=two", "train.workers"),
            ("train.workers=2.5", "train.workers"),
            ("train.workers=true", "train.workers"),
            ("train.workers=0", "train.workers"),
            ("train.zero_stage=4", "train.zero_stage"),
            ("train.warmup_ratio=1.5", "train.warmup_ratio"),
            ("train.eval_fraction=1.0", "train.eval_fraction"),
            ("train.load_best_model_at_end=true", "train"),
            ("train.metric_for_best_model=loss", "train"),
            ("train.learning_rate=.inf", "train.learning_rate"),
            ("train=fast", "train"),
            ("method.sharpness=.nan", "method.sharpness"),
            ("method.name=dop", "method.name"),
            ("score.workers=[2, 1]", "score.workers"),
            ("score.workers=[1, 2, 3]", "score.workers"),
            ("score.workers=0", "score.workers"),
            ("score.workers=many", "score.workers"),
            ("score.workers=[a, b]", "score.workers.0"),
            ("data.sample={sfe: 1}", "data.sample.sfe"),
            ("data.sample.safe=x", "data.sample.safe"),
            ("data.path=", "data.path"),
            ("data.max_prompt_length=2048", "data"),
            ("evaluate.benchmarks=[nothing]", "evaluate.benchmarks.0"),
            ("run_dir=2024", "run_dir"),
            ("seed=a", "seed"),
        ],
    )
    def test_wrong_values_name_the_key(self, load, override, key):
        named = override.partition("=")[0]
        assert refusal(load, override).startswith(f"override {named}: key {key}: ")

    @pytest.mark.parametrize("given", ["loss", "eval_loss", "eval_balance/margins", "rewards/accuracies"])
    def test_a_metric_that_the_method_logs_may_choose_the_best_model(self, load, given):
        kept = {"eval_fraction": 0.1, "save_steps": 100, "metric_for_best_model": given}
        assert load(train=kept).train.best_metric == f"eval_{given.removeprefix('eval_')}"

    @pytest.mark.parametrize(
        ("method", "given", "hint"),
        [
            ("bdpo", "rewards/accuracy", "; did you mean rewards/accuracies?"),
            ("bdpo", "nll_loss", "; did you mean loss?"),  # which it logs with nll_weight
            ("sft", "balance/margins", ""),
        ],
    )
    def test_a_metric_that_the_method_does_not_log_is_refused(self, load, method, given, hint):
        kept = {"eval_fraction": 0.1, "save_steps": 100}
        message = refusal(load, f"train.metric_for_best_model={given}", method={"name": method}, train=kept)
        assert "train.metric_for_best_model" in message
        assert f"with method.name={method} expects one of loss, " in message
        assert message.endswith(f"got '{given}'{hint}")

    @pytest.mark.parametrize("override", ["train.workers", "=3", "seed.deeper.still=1", "train.workers=[1"])
    def test_malformed_overrides_are_named(self, load, override):
        assert override.partition("=")[0] in refusal(load, override, seed=1)

    @pytest.mark.parametrize("key", ["run_dir", "model", "data"])
    def test_missing_key(self, key):
        values = {name: value for name, value in NEEDED.items() if name != key}
        assert refusal(parse_config, values, "here") == f"here: key {key} is missing"

    @pytest.mark.parametrize(
        "content", [None, b"", b"- a list", b"a: [", b"\xff", b"a: !!python/name:os.system"]
    )
    def test_useless_files(self, tmp_path, content):
        file = tmp_path / "run.yaml"
        if content is not None:
            file.write_bytes(content)
        assert refusal(load_config, file).startswith(f"{file}: ")

    def test_a_folder_for_a_file(self, tmp_path):
        assert "cannot be read" in refusal(load_config, tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)
    | st.sampled_from(["1e5", "12e-5", "null"]),
    rate=st.floats(min_value=1e-12, max_value=1e6),
    workers=st.integers(1, 9) | st.just([1, 3]),
    sample=st.none() | st.just({"safe": 3}),
)
def test_what_is_saved_is_what_is_loaded(tmp_path, name, rate, workers, sample):
    values = {**NEEDED, "run_dir": name, "model": {"name_or_path": name, "revision": name}}
    values |= {"data": {"path": name, "sample": sample}, "train": {"learning_rate": rate}}
    config = parse_config({**values, "score": {"workers": workers}}, "here")
    file = tmp_path / "saved.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(file) == config


def test_fresh_is_of_one_command_and_not_saved(load):
    config = load("fresh=true")
    assert config.fresh
    assert "fresh" not in yaml.safe_load(config.to_yaml())
