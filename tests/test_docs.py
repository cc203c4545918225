"""The pages lead where they say, and the first one stays short."""

from __future__ import annotations

import ast
import re

import pytest

from bdpo.storage.run_dir import RunDir
from pipelines.runtime.registry import PIPELINE
from tests.support import ROOT
from tests.support.helpers import tiny_config

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])

LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)|!\[[^\]\n]*\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def broken_links(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in filter(None, (part for match in LINK.findall(text) for part in match)):
        file, _, anchor = link.partition("#")
        target = page if not file else page.parent / file
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_within_the_project_leads_somewhere(page):
    assert list(broken_links(page)) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](#one) [b](#two) [c](missing.md) [d](https://example.org)\n")
    assert list(broken_links(page)) == ["#two", "missing.md"]


def test_the_way_of_a_pair_names_files_and_functions_that_exist():
    """CONTRIBUTING.md: `file` `name`, `file` `name` in the third column."""
    rows = re.findall(r"^\| \d+ \|[^|]*\|([^|]*)\|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert len(rows) == 18
    reference = re.compile(r"`((?:bdpo|pipelines)/[\w/.]+)`(?: `([\w.]+)`)?")
    named = [found for row in rows for found in reference.findall(row)]
    assert len(named) >= len(rows)
    assert [(file, name) for file, name in named if not is_defined(ROOT / file, name)] == []


def is_defined(file, name):
    """Whether a file exists and defines `function` or `Class.method`; without a name, whether it exists."""
    if not name or not file.exists():
        return file.exists()
    body = ast.parse(file.read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = [node for node in body if getattr(node, "name", None) == part]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def test_a_name_that_is_not_defined_is_found():
    file = ROOT / "bdpo" / "method" / "mi.py"
    assert is_defined(file, "Balanced.weights")
    assert not is_defined(file, "Balanced.mutual_information")
    assert not is_defined(file, "weights")


def test_the_page_on_running_lists_the_stages_in_their_order(tmp_path):
    config = tiny_config(tmp_path, tmp_path / "model", tmp_path / "pairs")
    page = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    table = page.partition("| stage |")[2].partition("\n\n")[0]
    listed = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert listed == [stage(config, RunDir(tmp_path)).name for stage in PIPELINE]


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000
