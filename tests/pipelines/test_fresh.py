"""`fresh=true` discards nothing if the command is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import run_command
from tests.support.helpers import save_model
from tests.support.pipeline import pipeline_inputs

MISFIT = "train.lora={target_modules: [x]}"

GONE = "evaluate.strongreject.path=gone.csv"

REFUSED = {
    "a search without such a measure": ("tune.search", ["tune.metric=no.such"], "tune.metric=no.such"),
    "a search of other data": ("tune.search", ["data.path=gone.jsonl"], "data.path=gone.jsonl"),
    "a search over misfit adapters": ("tune.search", [MISFIT], "target_modules"),
    "an experiment on other data": ("pipelines.experiment ablation", ["data.path=gone.jsonl"], "gone.jsonl"),
    "an experiment with vLLM": ("pipelines.experiment ablation", ["evaluate.engine=vllm"], "evaluate.engine"),
    "a tamper test without its section": ("pipelines.tamper", [], "tamper: the config has no such section"),
    "an attack of other requests": ("pipelines.attack", ["attack.benchmark=advbench"], "advbench.path"),
    "an evaluation of other prompts": ("pipelines.evaluate", [GONE], "gone.csv"),
    "a training of misfit adapters": ("pipelines.train", [MISFIT], "target_modules"),
}

SEARCHABLE = (
    "evaluate.benchmarks=[strongreject]",
    "tune={space: {method.alpha: [1, 2]}, constraint: strongreject.safety}",
)

MADE = (
    "data/manifest.json",
    "scores/manifest.json",
    "model/weights",
    "eval/base/summary.json",
    "tamper/model/weights",
    "tune/best.yaml",
    "experiments/ablation/results.csv",
    "attack/best_of_n/base/summary.json",
    "private/responses/base/0.parquet",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_chat):
    """With enough prompts for both parts of a search."""
    folder = pipeline_inputs(tmp_path_factory.mktemp("inputs"), tiny_chat)
    rows = "".join(f"a,x,take amber {number}\n" for number in range(12))
    (folder / "strongreject.csv").write_text(f"category,source,forbidden_prompt\n{rows}")
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_command_discards_nothing(inputs: Path, tmp_path: Path, tiny_chat, name: str) -> None:
    command, overrides, said = REFUSED[name]
    run = tmp_path / "run"
    for made in MADE:
        (run / made).parent.mkdir(parents=True, exist_ok=True)
        (run / made).write_text("made")
    save_model(run / "model", tiny_chat)
    (run / "config.yaml").write_text("")
    module, *names = command.split()
    config = "--config", inputs / "config.yaml", f"run_dir={run}", "fresh=true", *SEARCHABLE
    done = run_command(module, *names, *config, *overrides)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert said in done.err
    assert [made for made in MADE if not (run / made).is_file()] == []
