"""Each room imports only what is listed for it, and each import takes only what it needs."""

import ast
import json
import re
import subprocess
import sys

import pytest

from tests.support import ROOT

IMPORTS = {
    "errors": [],
    "stats": [],
    "section": [],
    "method": ["section"],
    "config": ["errors", "section", "method"],
    "storage": ["errors", "config"],
    "sandbox": ["errors", "config", "storage"],
    "models": ["errors", "config", "storage", "sandbox"],
    "data": ["errors", "config", "storage", "models"],
    "scoring": ["errors", "method", "config", "storage", "models", "data"],
    "training": ["errors", "method", "config", "storage", "models", "data"],
    "evaluation": ["errors", "stats", "config", "storage", "sandbox", "models"],
    "variants": ["errors", "stats", "config", "storage", "evaluation"],
    "search": ["errors", "method", "config", "storage", "training", "variants"],
    "cluster": [
        "errors",
        "config",
        "storage",
        "models",
        "data",
        "scoring",
        "training",
        "evaluation",
        "variants",
        "search",
    ],
    "reports": ["stats", "method", "config", "storage", "scoring", "evaluation"],
    "experiments": ["errors", "stats", "config", "storage", "scoring", "evaluation", "variants", "reports"],
}
"""The rooms of `bdpo` from the top down -> the rooms that each may import, which stand before it."""

ROOMS = tuple(IMPORTS)

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
    found = {path.stem for path in (ROOT / "bdpo").iterdir() if path.name[0] not in "._"}
    assert found - {"py"} == set(ROOMS)  # py.typed marks the package as typed


def test_the_table_of_rooms_has_their_order():
    """CONTRIBUTING.md lists the rooms from the top down, too."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = page.partition("\n| room |")[2].partition("\n\n")[0]
    cells = (row.split("|")[1] for row in table.splitlines()[2:])
    assert tuple(name for cell in cells for name in re.findall(r"`(\w+)`", cell)) == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_the_rooms_that_are_listed_for_it_and_no_other(room):
    assert set(IMPORTS[room]) <= set(ROOMS[: ROOMS.index(room)]), "not above it"
    found = {
        name.split(".")[1] for file in files_of(room) for name in imported(file) if name.startswith("bdpo.")
    }
    assert found - {room} == set(IMPORTS[room])


TORCH = (
    "evaluation.attacks.attacked",
    "evaluation.attacks.coordinate",
    "evaluation.attacks.gcg",
    "evaluation.attacks.suffixes",
    "evaluation.engines.hf",
    "method.ches",
    "models.architectures",
    "models.attention",
    "models.branches",
    "models.deepspeed_internals",
    "models.layers",
    "models.logps",
    "models.oom",
    "models.packing",
    "sandbox.model",
    "scoring.in_memory",
    "scoring.reference",
    "scoring.shard_scorer",
    "training.checkpoints",
    "training.engine",
    "training.export",
    "training.loop",
    "training.memory",
    "training.pairs",
    "training.reestimation",
    "training.resharding",
    "training.saving",
)
"""The modules of `bdpo` that import torch or transformers at their top: all that they do needs it."""

SLOW = {"torch", "transformers", "ray", "deepspeed", "datasets"}


def test_slow_libraries_are_imported_at_the_top_of_the_listed_modules_alone():
    """Ray, DeepSpeed and datasets at that of none."""
    found = {}
    for file in sorted((ROOT / "bdpo").rglob("*.py")):
        names = set(re.findall(r"^(?:import|from) (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE))
        if slow := names & SLOW:
            found[".".join(file.relative_to(ROOT / "bdpo").with_suffix("").parts)] = slow
    assert sorted(found) == sorted(TORCH)
    assert set().union(*found.values()) == {"torch", "transformers"}


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
"""The rooms that can be imported without torch: they import no module at their top that imports it."""

# Imports the rooms one after the other, those of few needs first; prints which slow libraries each brought.
IMPORT_ALL = """
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
    for room in sorted(ROOMS, key=lambda room: room not in WITHOUT_TORCH):
        files = [file.relative_to(ROOT).with_suffix("") for file in files_of(room)]
        rooms.append((room, [".".join(file.parts) for file in files]))
    command = [sys.executable, "-c", IMPORT_ALL, json.dumps(rooms)]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("room", ["bdpo", *ROOMS])
def test_a_room_brings_in_slow_libraries_only_with_modules_that_need_them(brought, room):
    without = room in WITHOUT_TORCH | {"bdpo"}
    assert set(brought[room]) <= (set() if without else {"torch", "transformers"})


INTERNALS = {
    "Ray": (
        "pipelines/runtime/ray_internals",
        r"\bray\.[\w.]*\b_\w+|class_cache|ENV_VARS_TO_PROPAGATE|pickled_error_file|health_check_failure\b",
    ),
    "DeepSpeed": (
        "bdpo/models/deepspeed_internals.py",
        r"\bds_(?:id|numel|shape|status|tensor)\b|fp32_groups|fp32_flat_groups|mp_rank_|optim_states"
        r"|base_optimizer_state|_zero3_consolidated|_get_zero_param_shapes|\b_global_grad_norm",
    ),
    "transformers": (
        "bdpo/models/transformers_private.py",
        r"\b_attn_implementation|_supports_sdpa|_compile_jinja_template",
    ),
}
"""Library -> the one module or package that may have its private names, and a pattern of those."""


def private_names(library):
    """(file, name) of the private names of a library outside of the module for them."""
    place, pattern = INTERNALS[library]
    for folder in ("bdpo", "pipelines", "tune", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if not file.is_relative_to(ROOT / place):
                for name in re.findall(pattern, file.read_text(encoding="utf-8")):
                    yield str(file.relative_to(ROOT)), name


@pytest.mark.parametrize("library", INTERNALS)
def test_private_names_of_a_library_are_in_one_place(library):
    assert list(private_names(library)) == []
    place, pattern = INTERNALS[library]
    files = [ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py")
    assert any(re.search(pattern, file.read_text(encoding="utf-8")) for file in files)


def test_no_test_module_imports_another():
    """What several share is in `tests/support`, and the root of the repository is written once."""
    for file in (ROOT / "tests").rglob("*.py"):
        helpers = {".".join(name.split(".")[:2]) for name in imported(file) if name.startswith("tests")}
        assert helpers <= {"tests.support"}, file


@pytest.mark.parametrize("module", ["pipelines.status", "pipelines.runtime.registry"])
def test_the_registry_of_stages_is_light(module):
    """`python -m pipelines.status` reads a folder: it must not wait for what only other commands use."""
    heavy = {"ray", "deepspeed", "torch", "transformers", "scipy", "matplotlib", "httpx", "detect_secrets"}
    code = f"import sys, {module}\nfound = {heavy} & sys.modules.keys()\nassert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
