"""YAML and overrides that are wrong: one line of printable characters that names file, line or override."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdpo.config import ScoreConfig, load_config
from bdpo.config.reading import parse_override, parse_yaml
from bdpo.errors import UserError

NEEDED = "run_dir: runs/a\nmodel: {name_or_path: m}\ndata: {path: p}\n"


def doubling(lines):
    """YAML whose last key has 10 ** lines values, in a few hundred bytes."""
    names = [f"k{i}" for i in range(lines + 1)]
    pairs = pairwise(names)
    return f"k0: &k0 [{','.join('1' * 10)}]\n" + "".join(
        f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in pairs
    )


def refusal(tmp_path, text, *overrides):
    """The one line, with `F` for the file."""
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(file, overrides)
    message = str(caught.value).replace(str(file), "F")
    assert message.isprintable()
    assert len(message) < 300
    return message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "F: is empty; expects sections with keys"),
        ("# nothing\n", "F: is empty; expects sections with keys"),
        ("- a list\n", "F: expects sections with keys, found list"),
        ("a text", "F: expects sections with keys, found str"),
        (NEEDED + "seed: 1\nseed: 2\n", "F, line 5: not valid YAML (key seed stands twice)"),
        (
            NEEDED + "train: {workers: 1}\ntrain: {workers: 2}\n",
            "F, line 5: not valid YAML (key train stands",
        ),
        (NEEDED + "train:\n  workers: 1\n  workers: 2\n", "F, line 6: not valid YAML (key workers stands"),
        (NEEDED + "train: 5\n", "F: key train: expects a section with keys, got 5"),
        (NEEDED + "train: &a {lora: *a}\n", "F: key train.lora: an alias that leads into itself"),
        (NEEDED + "x: &a [[*a]]\n", "F: key x: an alias that leads into itself"),
        (NEEDED + doubling(9), "F: more than 100,000 values"),
        ("[" * 2000, "F: not valid YAML (nested too deeply)"),
        ("a: 1\n---\nb: 2\n", "F, line 2: not valid YAML (but found another document)"),
        (NEEDED + "? [a, b]\n: 1\n", "F: not a value of YAML (unhashable type: 'list')"),
        (NEEDED + "train: {<<: 3}\n", "F, line 4: not valid YAML (expected a mapping"),
        (NEEDED + "5: 1\n", "F: key 5: Keys should be strings"),
        (NEEDED + "seed: 2026-02-30\n", "F: not a value of YAML (day is out of range for month)"),
        (NEEDED + "model: {name_or_path: 'a\0b'}\n", "F: not valid YAML (unacceptable character #x0000"),
        (
            NEEDED.replace("p}", '"a\\ud800"}'),
            r"F: key data.path: holds the character '\ud800', which is not",
        ),
        (
            NEEDED.replace("p}", f"{'p' * 5000}}}"),
            "F: key data.path: 5,000 characters, expects at most 4,096",
        ),
        (
            NEEDED.replace("p}", f"{'é' * 3000}}}"),
            "F: key data.path: 3,000 characters, expects at most 4,096",
        ),
    ],
)
def test_a_file(tmp_path, text, said):
    assert refusal(tmp_path, text).startswith(said)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "run_dir=2026-02-30",
            "override run_dir: not a value of YAML (day is out of range for month); quote",
        ),
        ("run_dir=2026-02-20", "override run_dir: key run_dir: Input should be a valid string, got datetime"),
        ("seed=!!int abc", "override seed: not a value of YAML (invalid literal for int()"),
        ("seed=!!timestamp x", "override seed: not a value of YAML"),
        ("seed=" + "9" * 5000, "override seed: not a value of YAML (Exceeds the limit"),
        ("seed=99999999999", "override seed: key seed: Input should be less than 4294967296"),
        ("seed=" + "[" * 2000, "override seed: not valid YAML (nested too deeply)"),
        ("data.sample=&a {safe: *a}", "override data.sample: key data.sample.safe: an alias that leads into"),
        ("data.sample={safe: 1, safe: 2}", "override data.sample: not valid YAML (key safe stands twice)"),
        ('run_dir="a\\0b"', r"override run_dir: key run_dir: holds the character '\x00', which is not text"),
        ('run_dir="a\\ud800b"', r"override run_dir: key run_dir: holds the character '\ud800'"),
        ('run_dir="\\e[31m"', r"override run_dir: key run_dir: holds the character '\x1b'"),
        ("run_dir=a\udc80b", "override run_dir: not valid YAML (unacceptable character #xdc80"),
        ("run_dir=" + "a" * 5000, "override run_dir: key run_dir: 5,000 characters, expects at most 4,096"),
        ("a" * 5000 + "=1", "override " + "a" * 100 + "…: a key: 5,000 characters"),
        ("tr\x1bain=1", r"override tr\x1bain: a key: holds the character '\x1b'"),
        ("train=5", "override train: key train: expects a section with keys, got 5"),
        ("method=3", "override method: key method: expects a section with keys, got 3"),
        ("method.name=[dpo]", "override method.name: key method.name: expects one of bdpo, "),
        (
            "seed=010",
            "override seed: not valid YAML (010 is 8 in YAML; write that, or quote it if it is text)",
        ),
        ("seed=1:30", "override seed: not valid YAML (1:30 is 90 in YAML"),
        ("data.path=a #1.jsonl", "override data.path: what stands behind # is a comment in YAML; quote the"),
        ("data.path=#1.jsonl", "override data.path: what stands behind # is a comment in YAML; quote the"),
        ("seed.deep=1", "override seed.deep: key seed: Input should be a valid integer"),
        (
            "model.dtype=\u202ebf16",
            r"override model.dtype: key model.dtype: expects one of float32, bfloat16",
        ),
    ],
)
def test_an_override(tmp_path, override, said):
    assert refusal(tmp_path, NEEDED, "score.workers=1", override).startswith(said)


def test_a_value_in_quotes_may_hold_any_sign(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(NEEDED)
    assert load_config(file, ["data.path='a #1.jsonl'"]).data.path == "a #1.jsonl"
    assert load_config(file, ["data.path=a#1.jsonl"]).data.path == "a#1.jsonl"


def test_the_last_override_wins(tmp_path):
    """A script that has overrides of its own may be given others; a section replaces all of its keys."""
    file = tmp_path / "run.yaml"
    file.write_text(NEEDED + "score: {tokens_per_batch: 7}\n")
    score = load_config(file, ["score.workers=2", "score={workers: 3}", "score.gpus_per_worker=0"]).score
    default = ScoreConfig().tokens_per_batch
    assert (score.workers, score.gpus_per_worker, score.tokens_per_batch) == (3, 0, default)


@pytest.mark.parametrize("path", ["a" * 5000, "a\0b"])
def test_a_config_that_is_no_path(path):
    with pytest.raises(UserError, match=r": cannot be read \((File name too long|embedded null byte)\)$"):
        load_config(path)


def test_an_alias_that_is_a_tree_is_read(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        NEEDED + "score: &pool {workers: 2, gpus_per_worker: 0}\ntrain: {<<: *pool, workers: 3}\n"
    )
    config = load_config(file)
    assert (config.score.workers, config.train.workers, config.train.gpus_per_worker) == (2, 3, 0)


@given(st.text())
def test_no_text_is_a_traceback(text):
    for read in (lambda: parse_yaml(text, "here"), lambda: parse_override(text)):
        try:
            read()
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017
