"""The command that calibrates judges."""

from __future__ import annotations

import json

import pytest

from bdpo.errors import UserError
from bdpo.evaluation.judges.fitted import Classifier
from bdpo.evaluation.judges.registry import judge_note
from bdpo.storage.manifests import read_manifest
from tests.support.benchmark_files import write_csv
from tests.support.commands import run_command
from tests.support.fake_endpoint import fake_endpoint, honest
from tests.support.helpers import tiny_config

REFUSES, ANSWERS = "I'm sorry, but I can't help with that.", "Take a rope and cross its ends."


@pytest.fixture
def csv_files(tmp_path):
    """Two models: the first refuses both prompts, the second one of them, by the labels and by strings."""
    header = ["type", "prompt", "completion", "final_label"]
    refused, complied = (REFUSES, "2_full_refusal"), (ANSWERS, "1_full_compliance")
    rows = {"first": (refused, refused), "second": (refused, complied)}
    return [
        str(write_csv(tmp_path / f"{name}.csv", [header, ["a", "Tie 1", *one], ["b", "Tie 2", *two]]))
        for name, (one, two) in rows.items()
    ]


def agreement(files, out, *more, judges=("string_matching",)):
    columns = ("--prompt", "prompt", "--answer", "completion", "--label", "final_label")
    return run_command(
        "pipelines.agreement", "--answers", *files, *columns, "--judges", *judges, "--out", out, *more
    )


def test_two_files_are_two_models(csv_files, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = agreement(csv_files, tmp_path / "out")
    assert done.code == 0, done.err
    found = read_manifest(tmp_path / "out" / "agreement.json")
    judge = found["judges"]["string_matching"]
    assert (judge["n"], judge["accuracy"], judge["kappa"], judge["contradictions"]) == (4, 1, 1, 0)
    assert judge["confusion"] == {"complied": {"complied": 1}, "refused": {"refused": 3}}
    assert found["models"] == ["first", "second"]
    assert "2_full_refusal = refused" in done.out
    assert "first → second, n 2: labels -50.0" in done.out
    assert REFUSES not in done.out + (tmp_path / "out" / "agreement.json").read_text()


def test_judges_of_one_name_stand_beside_each_other(csv_files, tmp_path):
    with fake_endpoint(
        honest(**{"class": "full_refusal"}, refusal=0, convincingness=5, specificity=5)
    ) as endpoint:
        rubric = f"{{name: rubric, base_url: {endpoint.url}, model: m, retries: 0}}"
        done = agreement(csv_files, tmp_path, judges=("string_matching", rubric, rubric))
    assert done.code == 0, done.err
    found = read_manifest(tmp_path / "agreement.json")
    assert list(found["judges"]) == ["rubric", "rubric 2", "string_matching"]
    assert found["judges"]["rubric"]["accuracy"] == 0.75
    assert found["judges"]["rubric"]["contradictions"] == 4
    assert len(found["between_judges"]) == 3


def test_rows_are_chosen_and_those_left_out_are_counted(csv_files, tmp_path):
    done = agreement(csv_files, tmp_path, "--only", "type=a*")
    assert "2 rows left out: not type=a*" in done.out
    assert read_manifest(tmp_path / "agreement.json")["n"] == 2


def test_json_lines_with_a_column_of_models(tmp_path):
    rows = [
        {"who": "x", "p": "Tie", "a": REFUSES, "ok": True},
        {"who": "y", "p": "Tie", "a": None, "ok": False},
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = ("--prompt", "p", "--answer", "a", "--label", "ok", "--model", "who", "--true", "safe")
    done = run_command(
        "pipelines.agreement", "--answers", file, *columns, "--judges", "string_matching", "--out", tmp_path
    )
    assert done.code == 0, done.err
    found = read_manifest(tmp_path / "agreement.json")
    assert (found["models"], found["n"], found["left_out"]) == (["x"], 1, {"without an answer": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--label", "type"), "first.csv, row 1, column type: unknown label 'a'"),
        (("--label", "nothing"), "first.csv, row 1: no column nothing; there are"),
        (("--answers", "none.csv"), "--answers none.csv: no such file"),
        (("--judges", "strings"), "--judges strings: key evaluate.judge"),
        (("--judges", "{name: rubric"), "not valid YAML"),
        (("--judges", "rubric"), "base_url"),
    ],
)
def test_what_is_wrong_is_one_line(csv_files, tmp_path, change, message):
    done = agreement(csv_files, tmp_path, *change)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1


def judged_with(folder, agreement_file, judge="string_matching"):
    """The config of a run whose judge was measured by an agreement."""
    judged = {"judge": judge, "agreement": str(agreement_file)}
    return tiny_config(folder / "run", folder / "model", folder / "pairs.jsonl", evaluate=judged)


def test_an_agreement_is_the_error_of_the_judge_that_it_measured(csv_files, tmp_path):
    fitted = tmp_path / "fitted.json"
    Classifier("refusal", ("sorry",), (1.0,), (1.0,), 0.0, 40).write(fitted)
    judges = ("string_matching", f"{{name: fitted, path: {fitted}}}")
    assert agreement(csv_files, tmp_path / "out", judges=judges).code == 0
    file = tmp_path / "out" / "agreement.json"
    measured = {name: found["bias"]["reach"] for name, found in read_manifest(file)["judges"].items()}
    assert measured["string_matching"] == 0
    declared = judge_note(tiny_config(tmp_path / "run", tmp_path / "model", tmp_path / "pairs.jsonl")).reach
    note = judge_note(judged_with(tmp_path, file))
    assert note.reach == {**declared, "refusal": 0}
    assert declared["refusal"] > 0.1
    note = judge_note(judged_with(tmp_path, file, {"name": "fitted", "path": str(fitted)}))
    assert note.reach == {"refusal": measured["fitted"]}


def test_an_agreement_on_another_judge_is_refused(csv_files, tmp_path):
    """Fingerprints are compared, not names: the classifier was fitted anew."""
    fitted = tmp_path / "fitted.json"
    Classifier("refusal", ("sorry",), (1.0,), (1.0,), 0.0, 40).write(fitted)
    assert agreement(csv_files, tmp_path / "out", judges=(f"{{name: fitted, path: {fitted}}}",)).code == 0
    file = tmp_path / "out" / "agreement.json"
    Classifier("refusal", ("sorry",), (1.0,), (2.0,), 0.0, 40).write(fitted)
    config = judged_with(tmp_path, file, {"name": "fitted", "path": str(fitted)})
    with pytest.raises(
        UserError, match=r"agreement\.json: did not measure this judge \(fitted\), but fitted with"
    ):
        judge_note(config)
    with pytest.raises(UserError, match=r"did not measure this judge \(string_matching\), but fitted"):
        judge_note(judged_with(tmp_path, file))
    with pytest.raises(UserError, match=r"evaluate\.agreement=.*gone\.json: no such file"):
        judge_note(judged_with(tmp_path, tmp_path / "gone.json"))
    assert agreement(csv_files[:1], tmp_path / "one").code == 0
    with pytest.raises(UserError, match="on one model"):
        judge_note(judged_with(tmp_path, tmp_path / "one" / "agreement.json"))
