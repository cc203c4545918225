"""What all judges have in common: no key that decides about a verdict is missing in a fingerprint."""

from __future__ import annotations

import pytest

from bdpo.config.judges import AnyJudge
from bdpo.evaluation.judges.fitted import Classifier
from bdpo.evaluation.judges.registry import judge_fingerprint
from bdpo.section import sections_in
from tests.support.helpers import save_model, tiny_config

KINDS = {section.kind(): section for section in sections_in(AnyJudge)}


@pytest.fixture(scope="module")
def values(tmp_path_factory, tiny_chat):
    """Two values of each key; of those that name files the content is another."""
    folder = tmp_path_factory.mktemp("judges")
    models = [str(save_model(folder / f"model-{seed}", tiny_chat, seed)) for seed in (0, 1)]
    files = [folder / f"{n}.json" for n in (0, 1)]
    for n, file in enumerate(files):
        Classifier("harm", ("so",), (1.0,), (float(n),), 0.0, n=9).write(file)
    paths = [str(file) for file in files]
    return {"model": models, "path": paths, "check": (True, False), "verdict": ("graded", "binary")}


@pytest.mark.parametrize("name", KINDS)
def test_every_key_that_decides_about_a_verdict_is_in_the_fingerprint(tmp_path, values, name):
    """A text of a key that is not among `values` is taken to be one that has no files."""
    fields, runtime_only = KINDS[name].model_fields, KINDS[name].runtime_only_keys()
    pairs = {key: values.get(key, ("one", "other")) for key in fields.keys() - runtime_only - {"name"}}
    first = {key: pair[0] for key, pair in pairs.items()} | {"name": name}
    first |= {"base_url": "http://localhost:1/v1"} if "base_url" in fields else {}

    def fingerprint(**changes):
        judge = first | changes
        return judge_fingerprint(tiny_config(tmp_path, tmp_path, tmp_path, evaluate={"judge": judge}))

    assert fingerprint() == fingerprint()
    for key, (_, other) in pairs.items():
        assert fingerprint(**{key: other}) != fingerprint(), key
