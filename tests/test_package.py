"""What `import bdpo` offers, and the page that shows it."""

from __future__ import annotations

import ast
import re

import pytest

import bdpo
from tests.support import ROOT
from tests.support.evaluation import canary_files
from tests.support.helpers import tiny_qwen2


@pytest.fixture(scope="module")
def names(tiny_chat, tmp_path_factory):
    """The names of the page's examples after all of them ran; model, tokenizer and files are the reader's."""
    found = {"model": tiny_qwen2(), "tokenizer": tiny_chat.tokenizer}
    folder = tmp_path_factory.mktemp("page")
    files = canary_files(folder)
    for code in EXAMPLES:
        for name, file in (("strongreject_dataset", "strongreject"), ("xstest_prompts", "xstest")):
            code = code.replace(f"{name}.csv", files[file]["path"])
        exec(code.replace("max_new_tokens=128", "max_new_tokens=4"), found)
    return found


PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")

EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_example_of_the_method_gives_the_numbers_in_its_comments(names):
    shown = re.findall(r"# (\d\.\d+) and (\d\.\d+)", EXAMPLES[0])
    numbers = [float(number) for both in shown for number in both]
    made = [*names["mi_chosen"].tolist(), *names["mi_rejected"].tolist()]
    assert [round(value, 2) for value in made] == numbers
    assert names["policy_chosen"].grad.abs().min() > 0


def test_the_example_of_the_scoring_has_a_weight_for_each_response(names):
    chosen, rejected = names["weights"]
    assert (chosen + rejected).tolist() == pytest.approx([1.5, 1.5])
    assert len(names["scores"]) == len(names["rows"])


def test_the_example_of_the_evaluation_has_an_estimate(names):
    assert names["safety"].n == 12
    assert names["evaluation"].summary.valid


def test_what_is_offered_is_listed_typed_and_documented():
    offered = set(bdpo.__all__) - {"__version__"}
    assert offered <= set(dir(bdpo))
    stub = ast.parse((ROOT / "bdpo" / "__init__.pyi").read_text(encoding="utf-8"))
    typed = {
        name: part.module for part in stub.body if isinstance(part, ast.ImportFrom) for name in aliases(part)
    }
    assert typed.keys() == offered
    for name, module in typed.items():
        assert getattr(bdpo, name).__module__ == module
        assert getattr(bdpo, name).__doc__
        assert re.search(rf"\b{name}\b", PAGE), name
    with pytest.raises(AttributeError, match="dpo_los"):
        bdpo.dpo_los  # noqa: B018


def aliases(part):
    """The names that a line of the stub exports: `from module import name as name`."""
    return [alias.asname for alias in part.names if alias.asname == alias.name]
