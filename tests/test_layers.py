"""Each room imports only the rooms above it, and each import takes only what it needs."""

import ast
import json
import re
import subprocess
import sys

import pytest

from tests.support import ROOT

ROOMS = (
    "errors",
    "stats",
    "section",
    "method",
    "config",
    "storage",
    "sandbox",
    "models",
    "data",
    "scoring",
    "training",
    "evaluation",
    "variants",
    "search",
    "cluster",
    "reports",
    "experiments",
)
"""The rooms of `bdpo` from the top down: a room may import those before it, and no other."""

FORBIDDEN = {"bdpo": {"ray", "pipelines", "tune"}, "pipelines": {"tune"}, "tune": set()}

REGISTRY = ROOT / "pipelines" / "runtime" / "registry.py"
"""The one file that names every stage, that of `tune` among them."""


def imported(file):
    """The modules that a file imports anywhere, with their full names."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            package = module in ("bdpo", "tests")
            yield from (f"{module}.{name.name}" for name in node.names) if package else [module]


def files_of(room):
    folder = ROOT / "bdpo" / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_nothing_imports_against_the_flow(package):
    for file in (ROOT / package).rglob("*.py"):
        if file != REGISTRY:
            assert not FORBIDDEN[package] & {name.split(".")[0] for name in imported(file)}, file


def test_every_room_has_its_place():
    rooms = {path.stem for path in (ROOT / "bdpo").iterdir() if path.name[0] not in "._"}
    assert rooms == set(ROOMS)


def test_the_table_of_rooms_has_their_order():
    """CONTRIBUTING.md lists the rooms from the top down, too."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = page.partition("\n| room |")[2].partition("\n\n")[0]
    cells = (row.split("|")[1] for row in table.splitlines()[2:])
    assert tuple(name for cell in cells for name in re.findall(r"`(\w+)`", cell)) == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_above_it(room):
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    for file in files_of(room):
        for name in imported(file):
            package, _, rest = name.partition(".")
            if package == "bdpo" and rest:
                assert rest.split(".")[0] in allowed, f"{file} imports {name}"


WITHOUT_TORCH = {
    "errors",
    "stats",
    "section",
    "config",
    "storage",
    "data",
    "variants",
    "experiments",
    "search",
    "reports",
}

# Room -> the slow libraries that its modules may import at their top; Ray and DeepSpeed in no room.
SLOW = {room: set() if room in WITHOUT_TORCH else {"torch", "transformers"} for room in ROOMS}

# Imports the rooms one after the other, those of few needs first; prints which slow libraries each brought.
IMPORTS = """
import importlib, json, sys
slow, brought = {"ray", "deepspeed", "torch", "transformers", "datasets"}, {}
for room, modules in json.loads(sys.argv[1]):
    before = slow & sys.modules.keys()
    for module in modules:
        importlib.import_module(module)
    brought[room] = sorted((slow & sys.modules.keys()) - before)
print(json.dumps(brought))
"""


@pytest.fixture(scope="module")
def brought():
    """What the import of each room's modules brought in, of a process of its own."""
    rooms = [("bdpo", ["bdpo"])]
    for room in sorted(ROOMS, key=lambda room: len(SLOW[room])):
        files = [file.relative_to(ROOT).with_suffix("") for file in files_of(room)]
        rooms.append((room, [".".join(file.parts) for file in files]))
    command = [sys.executable, "-c", IMPORTS, json.dumps(rooms)]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("room", ["bdpo", *ROOMS])
def test_a_room_imports_slow_libraries_only_where_all_of_it_needs_them(brought, room):
    assert set(brought[room]) <= SLOW.get(room, set())


def test_no_test_module_imports_another():
    """What several share is in `tests/support`, and the root of the repository is written once."""
    for file in (ROOT / "tests").rglob("*.py"):
        helpers = {".".join(name.split(".")[:2]) for name in imported(file) if name.startswith("tests")}
        assert helpers <= {"tests.support"}, file


@pytest.mark.parametrize("module", ["pipelines.status", "pipelines.runtime.registry"])
def test_the_registry_of_stages_is_light(module):
    """`python -m pipelines.status` reads a folder: it must not wait for torch."""
    heavy = {"ray", "deepspeed", "torch", "transformers", "scipy", "matplotlib"}
    code = f"import sys, {module}\nfound = {heavy} & sys.modules.keys()\nassert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
