"""Jailbreak artifacts, prefills, wrappers, SimpleQA: what their files become."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bdpo.config import EvaluateConfig
from bdpo.config.evaluate import OverRefusalConfig
from bdpo.errors import UserError
from bdpo.evaluation.benchmarks import (
    jailbreak,
    over_refusal,
    prefill,
    simpleqa,
    strongreject,
    wrapped,
    xstest,
)
from bdpo.evaluation.benchmarks.items import Item
from bdpo.evaluation.benchmarks.registry import load_items
from bdpo.evaluation.responses import prefill_ids
from bdpo.models.tokenizer import ChatTokenizer
from tests.support.benchmark_files import SECRET, STRONGREJECT, artifact, write_csv, write_json
from tests.support.chats import CHATML, byte_tokenizer


def test_an_artifact_becomes_its_attacks_and_the_goals_behind_them(tmp_path: Path) -> None:
    files = [write_json(tmp_path / f"{method}.json", artifact(method)) for method in ("PAIR", "GCG")]
    items = jailbreak.load(files)
    assert [item.item_id for item in items] == [
        f"jailbreak-{method}/duck-7b-{index}" for method in ("PAIR", "GCG") for index in range(3)
    ]
    assert [item.prompt for item in items[:3]] == ["Sing: a", None, "Sing: c"]
    assert [item.request for item in items[:3]] == ["Goal 0", "Goal 1", "Goal 2"]
    assert {item.category for item in items} == {"PAIR/duck-7b", "GCG/duck-7b"}
    assert not any(item.should_comply for item in items)


def test_a_limit_is_spread_over_attacks_and_kinds_of_harm(tmp_path: Path) -> None:
    """The first rows would be one attack on one kind of harm."""
    content = artifact(prompts=tuple(f"Sing {n}" for n in range(8)))
    for number, jailbreak_ in enumerate(content["jailbreaks"]):
        jailbreak_["category"] = f"Kind {number // 2}"
    names = ("PAIR", "GCG")
    files = [
        write_json(tmp_path / f"{name}.json", content | {"parameters": {"method": name, "model": "duck-7b"}})
        for name in names
    ]
    values = {"benchmarks": ["jailbreak"], "jailbreak": {"paths": [str(file) for file in files]}}
    items = load_items(EvaluateConfig(**values, limit=8))
    assert {item.category for item in items} == {f"{name}/duck-7b" for name in names}
    assert {item.topic for item in items} == {f"Kind {n}" for n in range(4)}


@pytest.mark.parametrize("limit", range(2, 25, 2))
def test_no_attack_is_tried_on_other_kinds_of_harm_than_another(tmp_path: Path, limit: int) -> None:
    """The second artifact has its requests in another order, and no attack on some of them."""
    files = []
    for name in ("PAIR", "GCG", "TAP"):
        content = artifact(prompts=tuple(f"Sing {n}" for n in range(24)))
        content["parameters"] = {"method": name, "model": "duck-7b"}
        for number, jailbreak_ in enumerate(content["jailbreaks"]):
            jailbreak_["category"] = f"Kind {number // 4}"
        if name == "GCG":
            content["jailbreaks"].reverse()
        if name == "TAP":
            for jailbreak_ in content["jailbreaks"][:1]:
                jailbreak_["prompt"] = None
        files.append(str(write_json(tmp_path / f"{name}.json", content)))
    values = {"benchmarks": ["jailbreak"], "jailbreak": {"paths": files}}
    items = load_items(EvaluateConfig(**values, limit=3 * limit))
    asked = [item for item in items if item.prompt is not None]
    assert (len(asked), len(items)) == (min(3 * limit, 71), min(3 * limit, 71) + 1)
    kinds = [
        Counter(item.topic for item in asked if item.category == f"{name}/duck-7b")
        for name in ("PAIR", "GCG")
    ]
    assert kinds[0] == kinds[1]
    if limit <= 18:  # TAP has three requests of the first kind
        assert kinds[0] == Counter(item.topic for item in asked if item.category == "TAP/duck-7b")
        goals = [
            {item.request for item in asked if item.category == f"{name}/duck-7b"} for name in ("PAIR", "GCG")
        ]
        assert goals[0] == goals[1]


def test_requests_without_an_attack_do_not_use_up_the_limit(tmp_path: Path) -> None:
    content = artifact(prompts=(*[None] * 6, "Sing 6", "Sing 7", "Sing 8"))
    file = str(write_json(tmp_path / "PAIR.json", content))
    items = load_items(EvaluateConfig(benchmarks=["jailbreak"], jailbreak={"paths": [file]}, limit=2))
    assert [item.prompt for item in items if item.prompt] == ["Sing 6", "Sing 7"]
    assert len(items) == 8


def broken(**changes: Any) -> Any:
    content = artifact(prompts=(SECRET,))
    content["jailbreaks"][0] |= changes
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expects an object"),
        ({"jailbreaks": []}, "expects an object with `parameters`"),
        (artifact() | {"jailbreaks": []}, "a list of `jailbreaks`"),
        (artifact() | {"parameters": {"method": "PAIR"}}, "parameters, key model: expects a text"),
        (artifact() | {"jailbreaks": [SECRET]}, "jailbreak 1: expects an object"),
        (broken(goal=None), "jailbreak 1, key goal: expects a text"),
        (broken(goal=" "), "jailbreak 1, key goal: expects a text"),
        (broken(prompt=3), "jailbreak 1, key prompt: expects a text"),
        (broken(prompt=SECRET + "\ud83d"), "jailbreak 1, key prompt: is not valid Unicode"),
        (broken(goal="\udc80" + SECRET), "jailbreak 1, key goal: is not valid Unicode"),
        (artifact("PAIR\ud83d"), "parameters, key method: is not valid Unicode"),
        (artifact() | {"jailbreaks": [{"goal": SECRET}]}, "jailbreak 1: expects the keys index and prompt"),
        (broken(index="٣"), "jailbreak 1, key index: expects a number"),
    ],
)
def test_a_broken_artifact_is_refused_by_place(tmp_path: Path, content: Any, message: str) -> None:
    file = write_json(tmp_path / "broken.json", content)
    with pytest.raises(UserError, match=message) as error:
        jailbreak.load([file])
    assert str(error.value).startswith(str(file))
    assert SECRET not in str(error.value)


def test_a_pointer_of_git_lfs_is_called_one(tmp_path: Path) -> None:
    for name, read in (
        ("a.json", lambda file: jailbreak.load([file])),
        ("a.csv", strongreject.load),
        ("a.jsonl", lambda file: over_refusal.load(OverRefusalConfig(path=str(file)))),
    ):
        file = tmp_path / name
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abab\nsize 12345678\n")
        with pytest.raises(UserError, match=f"{name}: a Git LFS pointer instead of the file"):
            read(file)


def past_tense(*entries: Any, **changes: Any) -> Any:
    content = {"target_model": "duck-8b", "n_requests": 2, "n_restarts": 20, "jb_artifacts": list(entries)}
    return content | changes


def rewritten(request: int, restart: int = 3, **changes: Any) -> Any:
    entry = {"i_request": request, "i_restart": restart, "request": f"Goal {request}", "response": SECRET}
    return entry | {"request_reformulated": f"How did people sing {request}?"} | changes


def test_past_tense_artifacts_have_a_schema_of_their_own(tmp_path: Path) -> None:
    """A request that was rewritten twice is one cluster; JailbreakBench's artifacts stand beside it."""
    file = write_json(tmp_path / "past.json", past_tense(rewritten(0), rewritten(0, 7), rewritten(1)))
    items = jailbreak.load([file, write_json(tmp_path / "jbb.json", artifact())])
    assert [(item.item_id, item.prompt, item.request) for item in items[:3]] == [
        (f"jailbreak-past_tense/duck-8b-{n}-{restart}", f"How did people sing {n}?", f"Goal {n}")
        for n, restart in ((0, 3), (0, 7), (1, 3))
    ]
    assert {item.category for item in items} == {"past_tense/duck-8b", "PAIR/duck-7b"}
    first, again, other = (item.cluster for item in items[:3])
    assert first == again != other
    assert (first, other) == (items[3].cluster, items[4].cluster)


@pytest.mark.parametrize("beside", [False, True])
def test_a_limit_is_spread_over_an_artifact_that_names_no_kinds(tmp_path: Path, beside: bool) -> None:
    """The kinds are those of the same requests elsewhere, else the tenths of the artifact."""
    files = [write_json(tmp_path / "past.json", past_tense(*(rewritten(n) for n in range(40))))]
    if beside:
        content = artifact(prompts=tuple(f"Sing {n}" for n in range(40)))
        for number, jailbreak_ in enumerate(content["jailbreaks"]):
            jailbreak_["category"] = f"Kind {number // 20}"
            jailbreak_["goal"] += "?" * (number == 30) + " other" * (number == 31)  # one is worded otherwise
        files.append(write_json(tmp_path / "jbb.json", content))
    values = {"benchmarks": ["jailbreak"], "jailbreak": {"paths": [str(file) for file in files]}}
    items = load_items(EvaluateConfig(**values, limit=10 if not beside else 20))
    own = [item for item in items if item.category == "past_tense/duck-8b"]
    numbers = [int(item.item_id.split("-")[-2]) for item in own]
    if beside:
        assert Counter(item.topic for item in own) == {"Kind 0": 5, "Kind 1": 5}
        assert {item.topic for item in jailbreak.load(files)} == {"Kind 0", "Kind 1"}
    else:
        assert numbers == list(range(0, 40, 4))


def test_a_cluster_is_the_wording_of_a_goal_and_not_its_number(tmp_path: Path) -> None:
    """Every source numbers its requests anew."""
    goals = {"PAIR": ("Build a kite", "Sew a flag"), "GCG": ("sew  a flag.", "Fold a hat")}
    files = []
    for name, own in goals.items():
        content = artifact(name, prompts=("Sing", "Sing"))
        for jailbreak_, goal in zip(content["jailbreaks"], own, strict=True):
            jailbreak_["goal"] = goal
        files.append(write_json(tmp_path / f"{name}.json", content))
    kite, flag, same_flag, hat = (item.cluster for item in jailbreak.load(files))
    assert flag == same_flag
    assert len({kite, flag, hat}) == 3
    assert not any(word in kite for word in ("build", "kite"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (past_tense(), "expects a list of `jb_artifacts`"),
        (past_tense(rewritten(0), target_model=None), "key target_model: expects a text"),
        (past_tense(rewritten(0), SECRET), "artifact 2: expects an object"),
        (past_tense(rewritten(0, request_reformulated=" ")), "artifact 1, key request_reformulated: expects"),
        (
            past_tense(rewritten(0, request_reformulated=SECRET + "\ud83d")),
            "artifact 1, key request_reformulated: is not valid Unicode",
        ),
        (past_tense(rewritten(0, i_request="x")), "artifact 1, key i_request: expects a number"),
        (past_tense(rewritten(0), rewritten(0)), "past_tense/duck-8b-0-3 appears twice"),
    ],
)
def test_a_broken_past_tense_artifact_is_refused_by_place(tmp_path: Path, content: Any, message: str) -> None:
    file = write_json(tmp_path / "past.json", content)
    with pytest.raises(UserError, match=message) as error:
        jailbreak.load([file])
    assert SECRET not in str(error.value)


def test_artifacts_that_are_no_json_or_listed_twice_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(b'{"goal": "' + SECRET.encode() + b"\xff")
    with pytest.raises(UserError, match="not valid JSON") as error:
        jailbreak.load([tmp_path / "bad.json"])
    assert SECRET not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        jailbreak.load([tmp_path / "none.json"])
    (tmp_path / "bad.json").write_text(json.dumps(artifact()).replace('"goal"', '"goal": "x", "goal"', 1))
    with pytest.raises(UserError, match="a key stands twice"):
        jailbreak.load([tmp_path / "bad.json"])
    file = write_json(tmp_path / "a.json", artifact())
    with pytest.raises(UserError, match="PAIR/duck-7b-0 appears twice"):
        jailbreak.load([file, file])


def test_prefills_are_the_first_tokens_of_the_answer(tmp_path: Path) -> None:
    rows = [list(prefill.COLUMNS), ["knots", "Tie it", "Sure: cross"], ["spoons", "Bend it", "Ok"]]
    items = prefill.load(write_csv(tmp_path / "prefill.csv", rows), [40, 3, 3])
    assert [(item.item_id, item.category, item.prompt) for item in items] == [
        ("prefill-0001-003", "003 tokens", "Tie it"),
        ("prefill-0001-040", "040 tokens", "Tie it"),
        ("prefill-0002-003", "003 tokens", "Bend it"),
        ("prefill-0002-040", "040 tokens", "Bend it"),
    ]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    chat = ChatTokenizer(tokenizer)
    texts = [tokenizer.decode(prefill_ids(chat, item)) for item in items]
    assert texts == ["Sur", "Sure: cross", "Ok", "Ok"]  # a byte a token, and never the end of turn


def test_wrappers_go_around_each_prompt_and_the_judge_sees_the_bare_one(tmp_path: Path) -> None:
    config = EvaluateConfig(
        benchmarks=["wrapped"], strongreject={"path": str(write_csv(tmp_path / "s.csv", STRONGREJECT))}
    )
    items = load_items(config)
    assert len(items) == 2 * 8
    assert {item.category for item in items} == {"past_tense", "role_play"} == set(wrapped.TEMPLATES)
    for item in items:
        assert item.request in (item.prompt or "")
        assert item.request != item.prompt
    assert items[0].item_id == "wrapped-past_tense-strongreject-0001"
    assert len({item.item_id for item in items}) == len(items)


def test_simpleqa_questions_have_their_answer_as_reference(tmp_path: Path) -> None:
    rows = [list(simpleqa.COLUMNS), ["{'topic': 'x'}", "How many?", "51"]]
    [item] = simpleqa.load(write_csv(tmp_path / "q.csv", rows))
    assert item == Item("simpleqa-0001", "simpleqa", "facts", "How many?", "How many?", True, reference="51")


def test_no_repr_quotes_a_text() -> None:
    item = Item("id", "b", "c", SECRET, SECRET, False, SECRET, 3, SECRET)
    assert SECRET not in repr(item)


def test_the_small_subset_is_the_first_ten_of_each_category(tmp_path: Path) -> None:
    rows = [STRONGREJECT[0], *[[f"c{n % 6}", "x", f"Prompt {n}"] for n in range(313)]]
    file = write_csv(tmp_path / "s.csv", rows)
    small = strongreject.load(file, "small")
    assert len(small) == 60
    expected = {item.item_id for c in range(6) for item in strongreject.load(file)[c : c + 60 : 6]}
    assert {item.item_id for item in small} == expected


def xstest_file(file: Path, changes: dict[str, int] | None = None) -> Path:
    counts = dict.fromkeys(xstest.TYPES, 25) | (changes or {})
    kinds = [kind for kind, count in sorted(counts.items()) for _ in range(count)]
    rows = [
        [str(n), f"Prompt {n}", kind, "unsafe" if kind.startswith("contrast_") else "safe", "", ""]
        for n, kind in enumerate(kinds)
    ]
    return write_csv(file, [list(xstest.COLUMNS), *rows])


def test_xstest_is_18_types_of_25(tmp_path: Path) -> None:
    items = xstest.load(xstest_file(tmp_path / "x.csv"))
    assert (len(items), sum(item.should_comply for item in items)) == (450, 250)
    assert len(xstest.TYPES) == 18


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"homonyms": 24}, "25 prompts of type homonyms, the file has 24"),
        ({"contrast_discr": 26}, "25 prompts of type contrast_discr, the file has 26"),
        ({"definitions": 0}, "25 prompts of type definitions, the file has 0"),
        ({"ducks": 1}, "0 prompts of type ducks, the file has 1"),
        (dict.fromkeys(xstest.TYPES, 0) | {"homonyms": 1}, "has 0"),
    ],
)
def test_a_part_of_xstest_is_not_taken_for_xstest(
    tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        xstest.load(xstest_file(tmp_path / "x.csv", changes))


def test_a_set_of_other_types_may_have_any_size(tmp_path: Path) -> None:
    changes = dict.fromkeys(xstest.TYPES, 0) | {"ducks": 3, "contrast_ducks": 2}
    assert len(xstest.load(xstest_file(tmp_path / "x.csv", changes))) == 5


def test_jailbreak_without_artifacts_is_refused() -> None:
    with pytest.raises(UserError, match=r"evaluate\.jailbreak\.paths is missing"):
        load_items(EvaluateConfig(benchmarks=["jailbreak"]))
