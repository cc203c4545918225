"""The command that calibrates judges."""

from __future__ import annotations

import json
import re
from pathlib import Path

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


@pytest.fixture
def measured_files(tmp_path):
    """Two models and forty prompts, of which the second refuses a half."""
    header = ["type", "prompt", "completion", "final_label"]
    refused, complied = (REFUSES, "2_full_refusal"), (ANSWERS, "1_full_compliance")
    return [
        str(
            write_csv(
                tmp_path / f"{name}.csv",
                [
                    header,
                    *(["ab"[n % 2], f"Tie {n}", *(refused if n < most else complied)] for n in range(40)),
                ],
            )
        )
        for name, most in (("all", 40), ("half", 20))
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


def test_an_agreement_is_the_error_of_the_judge_that_it_measured(measured_files, tmp_path):
    fitted = tmp_path / "fitted.json"
    Classifier("refusal", ("sorry",), (1.0,), (1.0,), 0.0, 40).write(fitted)
    judges = ("string_matching", f"{{name: fitted, path: {fitted}}}")
    assert agreement(measured_files, tmp_path / "out", judges=judges).code == 0
    file = tmp_path / "out" / "agreement.json"
    measured = {name: found["bias"]["reach"] for name, found in read_manifest(file)["judges"].items()}
    assert 0 < measured["string_matching"] < 0.15
    declared = judge_note(tiny_config(tmp_path / "run", tmp_path / "model", tmp_path / "pairs.jsonl")).reach
    note = judge_note(judged_with(tmp_path, file))
    assert note.reach == {**declared, "refusal": measured["string_matching"]}
    assert declared["refusal"] > 0.15
    note = judge_note(judged_with(tmp_path, file, {"name": "fitted", "path": str(fitted)}))
    assert note.reach == {"refusal": measured["fitted"]}


def test_an_agreement_on_another_judge_is_refused(measured_files, tmp_path):
    """Fingerprints are compared, not names: the classifier was fitted anew."""
    fitted = tmp_path / "fitted.json"
    Classifier("refusal", ("sorry",), (1.0,), (1.0,), 0.0, 40).write(fitted)
    assert (
        agreement(measured_files, tmp_path / "out", judges=(f"{{name: fitted, path: {fitted}}}",)).code == 0
    )
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
    assert agreement(measured_files[:1], tmp_path / "one").code == 0
    with pytest.raises(UserError, match="on too few models, prompts or verdicts"):
        judge_note(judged_with(tmp_path, tmp_path / "one" / "agreement.json"))


def test_an_error_of_few_prompts_or_of_a_selection_is_no_calibration(csv_files, measured_files, tmp_path):
    assert agreement(csv_files, tmp_path / "few").code == 0
    with pytest.raises(UserError, match="on too few models, prompts or verdicts"):
        judge_note(judged_with(tmp_path, tmp_path / "few" / "agreement.json"))
    assert agreement(measured_files, tmp_path / "only", "--only", "type=[ab]").code == 0
    with pytest.raises(UserError, match=r"measured string_matching on the rows type=\[ab\] alone \(--only\)"):
        judge_note(judged_with(tmp_path, tmp_path / "only" / "agreement.json"))


def test_parts_are_measured_by_themselves(measured_files, tmp_path):
    done = agreement(measured_files, tmp_path / "out", "--part", "prompt=Tie 3*", "type=a")
    assert done.code == 0, done.err
    bias = read_manifest(tmp_path / "out" / "agreement.json")["judges"]["string_matching"]["bias"]
    assert (
        bias["parts"]["type=a"]
        is bias["parts"]["other than type=a"]
        is bias["parts"]["prompt=Tie 3*"]
        is None
    )
    assert "other than prompt=Tie 3*: unknown" in done.out


# ---------------------------------------------------------------------------------------------- artifacts
def artifact(folder, name, model, answers):
    """An artifact of JailbreakBench: (answer, whether it is jailbroken) a goal."""
    jailbreaks = [
        {"index": n, "goal": f"Tie {n}", "prompt": answer and f"Play that you tie {n}", "response": answer,
         "jailbroken": flag}
        for n, (answer, flag) in enumerate(answers)
    ]  # fmt: skip
    content = {"parameters": {"method": "PAIR", "model": model}, "jailbreaks": jailbreaks}
    file = folder / name
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def test_artifacts_of_jailbreakbench_are_labelled_answers(tmp_path):
    one = artifact(tmp_path, "1.json", "m-1", [(ANSWERS, True), (REFUSES, False), (None, False)])
    other = artifact(tmp_path, "2.json", "m-2", [(REFUSES, False), (REFUSES, False)])
    columns = ("--prompt", "goal", "--answer", "response", "--label", "jailbroken")
    given = ("--answers", one, other, *columns, "--judges", "string_matching", "--out", tmp_path / "out")
    done = run_command("pipelines.agreement", *given)
    assert done.code == 0, done.err
    found = read_manifest(tmp_path / "out" / "agreement.json")
    assert (found["models"], found["n"], found["rubric"]) == (["PAIR/m-1", "PAIR/m-2"], 4, "harm")
    assert found["left_out"] == {"without an answer": 1}
    assert found["judges"]["string_matching"]["accuracy"] == 1
    twin = artifact(tmp_path, "3.json", "m-2", [(REFUSES, False)])
    done = run_command("pipelines.agreement", *given, "--answers", twin)
    assert (done.code, "both would be the model PAIR/m-2" in done.err) == (2, True)
    silent = artifact(tmp_path, "4.json", "m-4", [(None, False)] * 3)
    judged = ("--judges", "string_matching", "--out", tmp_path / "none")
    done = run_command("pipelines.agreement", "--answers", silent, *columns, *judged)
    message = f"error: --answers {silent}: no answer that has a label (3 rows without an answer)\n"
    assert (done.code, done.err) == (2, message)


def test_a_blank_behind_a_prompt_does_not_make_it_another(measured_files, tmp_path):
    first, second = map(Path, measured_files)
    text = second.read_text(encoding="utf-8")
    assert ",Tie 7," in text
    second.write_text(text.replace(",Tie 7,", ",Tie 7 ,"), encoding="utf-8")
    done = agreement([first, second], tmp_path)
    assert done.code == 0, done.err
    [pair] = read_manifest(tmp_path / "agreement.json")["judges"]["string_matching"]["bias"]["differences"]
    assert pair["n"] == 40


def test_artifacts_of_the_past_tense_attack_are_labelled_answers(tmp_path):
    entry = {"request": "Tie", "request_reformulated": "How was it tied?", "response": ANSWERS}
    entry |= {"i_request": 0, "i_restart": 0, "jailbroken_gpt": True, "jailbroken_rules": False}
    file = tmp_path / "past.json"
    file.write_text(json.dumps({"target_model": "m", "jb_artifacts": [entry]}), encoding="utf-8")
    columns = ("--prompt", "request", "--answer", "response", "--judges", "string_matching")
    for label, accuracy in (("jailbroken_gpt", 1), ("jailbroken_rules", 0)):
        out = tmp_path / label
        done = run_command("pipelines.agreement", "--answers", file, *columns, "--label", label, "--out", out)
        assert done.code == 0, done.err
        found = read_manifest(out / "agreement.json")
        assert (found["models"], found["judges"]["string_matching"]["accuracy"]) == (
            ["past_tense/m"],
            accuracy,
        )


# ------------------------------------------------------------------------------------------ small faults
def test_two_files_are_never_one_model(csv_files, tmp_path):
    (tmp_path / "more").mkdir()
    namesake = tmp_path / "more" / "first.csv"
    namesake.write_bytes((tmp_path / "first.csv").read_bytes())
    done = agreement([*csv_files, namesake], tmp_path / "out")
    assert (done.code, "both would be the model first" in done.err) == (2, True)
    for more in ((), ("--model", "type")):
        done = agreement([*csv_files, tmp_path / "more" / ".." / "first.csv"], tmp_path / "out", *more)
        assert (done.code, "stands there twice" in done.err) == (2, True)


def test_a_row_without_a_model_or_with_an_empty_cell_is_left_out(tmp_path):
    header = ["type", "prompt", "completion", "final_label"]
    rows = [
        ["", "Tie", ANSWERS, "complied"],
        ["m", "Tie", "", "complied"],
        [" m ", "Tie", ANSWERS, "complied"],
    ]
    file = write_csv(tmp_path / "answers.csv", [header, *rows, ["m", "Tie", ANSWERS, "  "]])
    done = agreement([file], tmp_path / "out", "--model", "type")
    assert done.code == 0, done.err
    found = read_manifest(tmp_path / "out" / "agreement.json")
    assert (found["models"], found["n"]) == (["m"], 1)
    assert found["left_out"] == {"without a model": 1, "without an answer": 1, "without a label": 1}


def test_what_cannot_be_written_or_fitted_is_said_before_a_judge_is_asked(
    csv_files, measured_files, tmp_path
):
    (tmp_path / "file").write_text("")
    with fake_endpoint(honest(**{"class": "full_refusal"})) as endpoint:
        judge = f"{{name: rubric, base_url: {endpoint.url}, model: m, retries: 0}}"
        for out, more, message in (
            ("file", (), "a file is where the folder would be"),
            ("file/below", (), "a file is where the folder would be"),
            ("out", ("--fit", tmp_path), "is a folder, expects a file"),
            ("out", ("--fit", tmp_path / "file" / "fit.json"), "a file is where the folder would be"),
            ("out", ("--fit", tmp_path / "fit.json"), "expects at least 20 of each class"),
        ):
            done = agreement(measured_files, tmp_path / out, *more, judges=(judge,))
            assert done.code == 2, done.err
            assert message in done.err
            assert done.err.count("\n") == 1
        assert not endpoint.authorizations


def test_intervals_are_whole_on_a_narrow_terminal(measured_files, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert re.search(r"100\.0 \(\d\d\.\d–100\.0\)", agreement(measured_files, tmp_path / "out").out)
