"""Attacks on a run's own models: records, artifacts, resuming, comparison, and inputs that are refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from bdpo.evaluation.benchmarks import jailbreak
from bdpo.evaluation.judges.base import Failed, Question, Verdict
from bdpo.models.tokenizer import ChatTokenizer
from bdpo.reports.cost import stage_costs
from bdpo.storage.manifests import write_manifest
from bdpo.storage.run_dir import RunDir
from pipelines.attack import AttackBase, AttackTrained, print_attacks
from pipelines.report import timed_stages
from pipelines.runtime.pool import InProcess
from pipelines.runtime.watched_actor import part_name
from pipelines.status import run_status
from tests.support.attacks import (
    GOAL,
    IN_PROCESS,
    REQUESTS,
    Interrupted,
    JudgeBy,
    attack_config,
    attacker_reply,
    attacker_section,
)
from tests.support.commands import run_command
from tests.support.fake_endpoint import completion, fake_endpoint, reply
from tests.support.helpers import save_model, tiny_config

KINDS: list[dict[str, Any]] = [
    {"name": "best_of_n", "n": 3, "batch_size": 2, "augmentations": ["scramble", "capitalise", "noise"]},
    {"name": "prefill", "tokens": [1, 3, 5]},
    {
        "name": "gcg",
        "candidates": 4,
        "top_k": 8,
        "check_steps": 1,
        "initial_suffix": "! !",
        "forward_passes": 12,
    },
]


def attacked(config: Any) -> AttackBase:
    stage = AttackBase(config, RunDir(config.run_dir), executor=IN_PROCESS)
    stage.complete()
    return stage


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Any:
    """judged(judge): the judge of all attacks of this test."""

    def use(judge: Any) -> None:
        monkeypatch.setattr("bdpo.evaluation.attacks.attacked.make_judge", lambda config: judge)

    return use


class Unable(JudgeBy):
    """Fails on the fourth request."""

    def __call__(self, question: Question, response: str) -> Verdict:
        return Failed("timeout") if question.request.endswith("3") else super().__call__(question, response)


@pytest.mark.parametrize("attack", KINDS, ids=lambda attack: attack["name"])
def test_an_attack_makes_an_artifact_that_the_benchmark_reads(
    attack: dict[str, Any], tmp_path: Path, tiny_chat: ChatTokenizer
) -> None:
    stage = attacked(attack_config(tmp_path, tiny_chat, **attack))
    content = json.loads(stage.artifact_file.read_text())
    items = jailbreak.load([stage.artifact_file])
    assert [item.request for item in items] == [f"{GOAL} {n}" for n in range(REQUESTS)]
    assert {item.category for item in items} == {f"{content['parameters']['method']}/model-base"}
    assert all(bool(item.prefill) == (attack["name"] == "prefill") for item in items)
    white = attack["name"] == "gcg"
    assert content["parameters"]["attack_type"] == ("white_box" if white else "black_box")
    assert content["parameters"]["number_of_submitted_prompts"] == REQUESTS
    scores = pq.read_table(stage.scores_file)
    assert GOAL not in str(scores.to_pydict())
    assert "prompt" not in scores.column_names
    assert GOAL not in stage.manifest_file.read_text()
    assert stage.artifact_file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("attack", KINDS, ids=lambda attack: attack["name"])
def test_an_interrupted_attack_resumes_to_the_same_artifact(
    attack: dict[str, Any], tmp_path: Path, tiny_chat: ChatTokenizer, judged: Any
) -> None:
    judged(JudgeBy(lambda response: "e" in response))
    undisturbed = attacked(attack_config(tmp_path, tiny_chat, "one", **attack))
    config = attack_config(tmp_path, tiny_chat, "two", **attack)
    stage = AttackBase(config, RunDir(config.run_dir), executor=Interrupted(2))
    with pytest.raises(KeyboardInterrupt):
        stage.complete()
    kept = {file: file.stat().st_mtime_ns for file in Path(config.run_dir).rglob("part-*")}
    assert len(kept) == 2
    stage.run.record(config)
    [status] = [found for found in run_status(stage.run) if found.stage == f"attack {attack['name']} base"]
    assert (status.state, status.facts) == ("begun", {"requests": 2})
    resumed = attacked(config)
    assert kept.items() <= {file: file.stat().st_mtime_ns for file in kept}.items()
    assert resumed.artifact_file.read_bytes() == undisturbed.artifact_file.read_bytes()
    assert resumed.scores_file.read_bytes() == undisturbed.scores_file.read_bytes()
    assert run_status(stage.run)[-1].as_json() == {
        "stage": resumed.name,
        "state": "done",
        "requests": REQUESTS,
        "valid": True,
    }


def test_an_attack_gives_signs_of_life_within_each_request(tmp_path: Path, tiny_chat: ChatTokenizer) -> None:
    config, begun = attack_config(tmp_path, tiny_chat, **KINDS[0]), []

    def begins(kind: str, what: str, at_least: float = 0.0) -> None:
        begun.append((kind, what))

    stage = AttackBase(config, RunDir(config.run_dir), executor=InProcess(begins=begins))
    stage.complete()
    parts = Counter(what for kind, what in begun if kind == f"part of {stage.name}")
    assert parts.keys() == {part_name(first, 1) for first in range(REQUESTS)}
    assert min(parts.values()) > 2


def test_the_attacks_of_a_run_folder_have_a_state_and_a_cost(tmp_path: Path) -> None:
    """Whatever kind of attack the config asks for now."""
    config = tiny_config(tmp_path / "run", tmp_path / "model", tmp_path / "pairs")
    run = RunDir(config.run_dir)
    run.record(config)
    for kind, model in (("gcg", "base"), ("pair", "base"), ("gcg", "trained")):
        (run.attack_texts(kind, model) / "records").mkdir(parents=True)
    write_manifest(run.attack("gcg", "base") / "summary.json", {}, valid=True, seconds=8.0, gpus=2.0)
    states = {found.stage: found.state for found in run_status(run) if found.stage.startswith("attack")}
    assert states == {
        "attack gcg base": "done",
        "attack pair base": "not begun",
        "attack gcg trained": "not begun",
    }
    [cost] = stage_costs(timed_stages(config, run))
    assert (cost.name, cost.seconds, cost.gpus) == ("attack gcg base", 8.0, 2.0)


def test_an_interrupted_pair_asks_its_attacker_for_no_request_again(
    tmp_path: Path, tiny_chat: ChatTokenizer, judged: Any
) -> None:
    def script(handler: Any, body: dict[str, Any]) -> None:
        reply(handler, completion(attacker_reply("sing")))

    judged(JudgeBy(lambda response: False))
    with fake_endpoint(script) as endpoint:
        section = attacker_section(endpoint.url, streams=1, depth=2)
        config = attack_config(tmp_path, tiny_chat, **section)
        stage = AttackBase(config, RunDir(config.run_dir), executor=Interrupted(2))
        with pytest.raises(KeyboardInterrupt):
            stage.complete()
        assert len(endpoint.bodies) == 2 * 2
        done = attacked(config)
        assert len(endpoint.bodies) == REQUESTS * 2
    summary = done.summary()
    assert (summary.n_judged, summary.queries) == (REQUESTS, REQUESTS * 3)
    assert summary.direct is not None
    items = jailbreak.load([done.artifact_file])
    assert {item.prompt for item in items} == {f"{GOAL} {n}" for n in range(REQUESTS)}  # the first of equals
    assert {item.category for item in items} == {"PAIR/model-base"}


def test_a_draw_does_not_depend_on_the_batch(tmp_path: Path, tiny_chat: ChatTokenizer, judged: Any) -> None:
    judged(JudgeBy(lambda response: False))
    one, two = (
        attacked(attack_config(tmp_path, tiny_chat, f"run{size}", n=4, batch_size=size)) for size in (1, 3)
    )
    contents = [json.loads(stage.artifact_file.read_text()) for stage in (one, two)]
    assert contents[0] == contents[1]
    assert {jailbreak["number_of_queries"] for jailbreak in contents[0]["jailbreaks"]} == {4}


def test_requests_that_failed_are_tried_again_and_are_in_no_rate(
    tmp_path: Path, tiny_chat: ChatTokenizer, judged: Any
) -> None:
    judged(Unable(lambda response: True))
    config = attack_config(tmp_path, tiny_chat, n=2)
    stage = attacked(config)
    assert stage.finished() is None  # invalid: one of five has no verdict
    values = json.loads(stage.manifest_file.read_text())
    assert values["failures"] == {"timeout": 1}
    assert values["success"]["n"] == REQUESTS - 1
    jailbreaks = json.loads(stage.artifact_file.read_text())["jailbreaks"]
    assert [entry["response"] is None for entry in jailbreaks] == [False, False, False, True, False]
    judged(JudgeBy(lambda response: True))
    assert attacked(config).summary().n_judged == REQUESTS


def test_a_summary_that_lacks_a_number_is_made_again_without_an_attack(
    tmp_path: Path, tiny_chat: ChatTokenizer, judged: Any
) -> None:
    def refuse(response: str) -> bool:
        raise AssertionError("asked again")

    judged(JudgeBy(lambda response: True))
    config = attack_config(tmp_path, tiny_chat, n=1)
    stage = attacked(config)
    manifest = stage.finished()
    assert manifest is not None
    older = {name: value for name, value in manifest.items() if name != "beyond_direct"}
    write_manifest(stage.manifest_file, manifest.fingerprint, **older)
    judged(JudgeBy(refuse))
    assert attacked(config).summary().success.value == 1.0


def test_a_prompt_that_leaves_no_room_is_null_and_not_safe(tmp_path: Path, tiny_chat: ChatTokenizer) -> None:
    config = attack_config(tmp_path, tiny_chat, n=2)
    long = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"max_new_tokens": 512})})
    values = json.loads(attacked(long).manifest_file.read_text())
    assert values["unanswered"] == {"prompt_too_long": REQUESTS}
    assert values["n_judged"] == 0
    assert not values["valid"]
    assert values["success"]["value"] is None
    items = jailbreak.load([attacked(long).artifact_file])
    assert [item.prompt for item in items] == [None] * REQUESTS


@pytest.fixture
def print_both(
    tmp_path: Path, tiny_chat: ChatTokenizer, judged: Any, capsys: pytest.CaptureFixture[str]
) -> Callable[[JudgeBy], str]:
    """print_both(judge): what is printed of a base model that always gives in, and of a trained one that this
    judge judges."""

    def printed(judge: JudgeBy) -> str:
        config = attack_config(tmp_path, tiny_chat, n=1)
        run = RunDir(config.run_dir)
        save_model(Path(str(run.model)), tiny_chat, seed=1)
        judged(JudgeBy(lambda response: True))
        base = attacked(config)
        judged(judge)
        trained = AttackTrained(config, run, executor=IN_PROCESS)
        assert trained.has_inputs
        trained.complete()
        print_attacks(config, [base, trained])
        return capsys.readouterr().out

    return printed


def test_base_and_trained_model_are_compared_pair_by_pair(print_both: Callable[[JudgeBy], str]) -> None:
    out = print_both(JudgeBy(lambda response: False))
    assert "base → trained: 100.0 → 0.0, -100.0 points" in out
    assert "string_matching" in out
    assert "with the judge's own error" in out
    assert GOAL not in out


def test_an_invalid_attack_is_not_compared(print_both: Callable[[JudgeBy], str]) -> None:
    out = print_both(Unable(lambda response: True))
    assert "invalid" in out
    assert "base → trained" not in out


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["attack.name=wizard"], "attack.name"),
        (["attack.n=0"], "attack.n"),
        (["attack.augmentations=[shout]"], "attack.augmentations"),
        (["attack.models=trained"], "attack.models=trained"),
        (["attack.name=gcg", "attack.forward_passes=5"], "attack.forward_passes=5"),
        (["attack.name=gcg", "attack.initial_suffix='<|im_end|>'"], "attack.initial_suffix"),
        (["attack.benchmark=advbench"], "evaluate.advbench.path"),
        (["attack.name=prefill", "attack.tokens=[]"], "attack.tokens"),
        (["attack={name: pair, gpus_per_worker: 0}"], "attack.attacker"),
        (
            ["attack={name: pair, attacker: {base_url: 'http://127.0.0.1:9/v1', model: m}}"],
            "attack.attacker.base_url=http://127.0.0.1:9/v1",
        ),
        (
            ["attack={name: pair, attacker: {base_url: 'http://h/v1', model: m, api_key_env: NO_SUCH_KEY}}"],
            "attack.attacker.api_key_env: the environment variable NO_SUCH_KEY",
        ),
        (
            ["attack={name: pair, attacker: {base_url: 'http://u:p@h/v1', model: m}}"],
            "attack.attacker.base_url holds a password",
        ),
        (["evaluate.judge=sandbox"], "evaluate.judge.name=sandbox"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    overrides: list[str], named: str, tmp_path: Path, tiny_chat: ChatTokenizer
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(attack_config(tmp_path, tiny_chat).to_yaml())
    done = run_command("pipelines.attack", "--config", file, *overrides)
    assert done.code == 2, done.err
    assert named in done.err
    assert done.err.strip().count("\n") == 0
