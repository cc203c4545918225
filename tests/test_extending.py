"""docs/extending.md works when it is followed to the letter, and counts its files right."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.long

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")

TITLES = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)

STEP = re.compile(r"^\d+\. `([^`\n]+)`: .*(?:\n\n   ```(\w+)\n((?:   .*\n|\n)+?)   ```)?$", re.MULTILINE)


def section(title):
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def steps(title):
    """(file, kind, content) of each step of a section; no content where a command makes the file."""
    return [
        (file, kind, re.sub("^   ", "", content, flags=re.MULTILINE))
        for file, kind, content in STEP.findall(section(title))
    ]


def follow(title, root):
    """Take the steps of a section in a copy of the repository."""
    for file, kind, content in steps(title):
        if kind == "python":
            assert not (root / file).exists(), f"{file} is there already"
            (root / file).write_text(content, encoding="utf-8")
        elif kind == "diff":
            for change in content.split("@@\n"):
                replace_lines(root / file, change.splitlines(keepends=True))


def replace_lines(file, change):
    """The lines without + become those without -, at the one place where the former stand."""
    old, new = ("".join(line[1:] or "\n" for line in change if line[0] != sign) for sign in "+-")
    text = "\n" + file.read_text(encoding="utf-8")
    assert text.count(f"\n{old}") == 1, f"{file} has not one place of\n{old}"
    file.write_text(text.replace(f"\n{old}", f"\n{new}")[1:], encoding="utf-8")


@pytest.mark.parametrize("title", TITLES)
def test_the_table_counts_the_files(title):
    by_hand = sum(bool(kind) for _, kind, _ in steps(title))
    made = [f"`{file}`" for file, kind, _ in steps(title) if not kind]
    anchor = title.lower().replace(" ", "-")
    assert (
        f"| [{title[0].lower()}{title[1:]}](#{anchor}) | {by_hand} | {made[0] if made else 'none'} |" in PAGE
    )


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the repository in which every section of the page was followed."""
    root = tmp_path_factory.mktemp("extended")
    for name in ("bdpo", "pipelines", "tune", "tests", "docs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, root)
    for title in TITLES:
        follow(title, root)
    run(root, "-m", "bdpo.config.reference")
    return root


def run(root, *arguments):
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_tests_that_the_page_adds_pass(extended):
    """All of the new files; of those that exist what is new."""
    files = {file for title in TITLES for file, kind, _ in steps(title) if kind and file.startswith("tests/")}
    new = "rdpo or not test_losses"
    run(extended, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", new, *sorted(files))


@pytest.mark.system
def test_the_checks_of_every_section_pass(extended):
    """The line below "To check:" of each, in one run of pytest."""
    checks = [re.search("^    python -m pytest (.+)$", section(title), re.MULTILINE)[1] for title in TITLES]
    files = sorted({file for check in checks for file in check.split()})
    run(extended, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not system", *files)


def test_the_examples_are_formatted_and_clean(extended):
    files = sorted({file for title in TITLES for file, _, _ in steps(title) if file.endswith(".py")})
    run(extended, "-m", "ruff", "format", "--check", *files)
    run(extended, "-m", "ruff", "check", *files)
