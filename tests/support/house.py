"""The measures of the house, each against its ceiling: `python -m tests.support.house`.

A room is a module or a package directly below `bdpo`, and each of `pipelines`, `tune` and `benchmarks`.
An arrow is a pair of rooms of which one imports the other, anywhere in a file.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support import ROOT

PACKAGES = ("bdpo", "pipelines", "tune", "benchmarks")


class Measure(NamedTuple):
    """What was counted, where the largest lies, and how much it may be."""

    name: str
    found: float
    where: str
    ceiling: float | None


class Function(NamedTuple):
    """A function or method of the source."""

    name: str
    lines: int
    parameters: int
    returns: str


def sources() -> dict[str, Path]:
    """Full name of every module -> its file."""
    files = (file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")))
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
    }


def room(module: str) -> str:
    """The room of a module."""
    package, *rest = module.split(".")
    return ".".join([package, *rest[:1]]) if package == "bdpo" else package


def imports(module: str, modules: dict[str, Path]) -> Iterator[str]:
    """The project's own modules that a module imports, at its top or in a function.

    Among them are those that a registry finds by name: `import_module(f"{package}.{name}").JUDGE`.
    """
    for node in ast.walk(ast.parse(modules[module].read_text(encoding="utf-8"))):
        match node:
            case ast.Import(aliases):
                names = [name.name for name in aliases]
            case ast.ImportFrom(str(package), aliases):
                names = [f"{package}.{name.name}" for name in aliases]
            case ast.Attribute(
                ast.Call(ast.Name("import_module"), [ast.JoinedStr([ast.Constant(str(start)), _])]), declared
            ):
                names = [
                    name for name in modules if name.startswith(start) and declares(modules[name], declared)
                ]
            case _:
                continue
        for name in names:
            found = name if name in modules else name.rpartition(".")[0]
            if found in modules and found != module:
                yield found


def declares(file: Path, name: str) -> bool:
    """Whether a module assigns this name."""
    return f"\n{name} = " in file.read_text(encoding="utf-8")


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, whatever way round (Tarjan's components of more than one)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        path.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in path:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = path[path.index(node) :]
            del path[path.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def classes(modules: dict[str, Path]) -> Counter[str]:
    """How many public classes have each name."""
    return Counter(
        node.name
        for file in modules.values()
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )


def functions(modules: dict[str, Path]) -> list[Function]:
    """All functions and methods; `self`, `cls` and `**settings` are no parameters."""
    found = []
    for module, file in modules.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                arguments += [node.args.vararg] if node.args.vararg else []
                own = sum(argument.arg not in ("self", "cls") for argument in arguments)
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                returns = ast.unparse(node.returns) if node.returns else ""
                found.append(Function(f"{module}.{node.name}", lines, own, returns))
    return found


def measures() -> list[Measure]:
    """All of them, largest first where a place is named."""
    modules = sources()
    graph = {module: set(imports(module, modules)) for module in modules}
    arrows = {(room(one), room(other)) for one in graph for other in graph[one] if room(one) != room(other)}
    found = circles(graph)
    files = {module: len(file.read_text(encoding="utf-8").splitlines()) for module, file in modules.items()}
    longest_file = max(files, key=lambda module: files[module])
    every = functions(modules)
    longest = max(every, key=lambda function: function.lines)
    widest = max(every, key=lambda function: function.parameters)
    dicts = [function.name for function in every if function.returns == "dict[str, Any]"]
    twice = [name for name, count in classes(modules).items() if count > 1]
    return [
        Measure("rooms", len({room(module) for module in modules} - {"bdpo"}), "", 20),
        Measure("arrows between rooms", len(arrows), "", 110),
        Measure("circles of modules", len(found), "; ".join(" - ".join(circle) for circle in found), 0),
        Measure("lines of the largest file", files[longest_file], longest_file, 350),
        Measure("lines of the longest function", longest.lines, longest.name, 57),
        Measure("lines of a function, median", statistics.median(f.lines for f in every), "", None),
        Measure("most parameters", widest.parameters, widest.name, 6),
        Measure("functions that return dict[str, Any]", len(dicts), ", ".join(dicts[:3]), 10),
        Measure("names of several classes", len(twice), ", ".join(twice), 0),
    ]


def main() -> None:
    """Print the table; exit code 1 if a ceiling is passed."""
    high = False
    for name, found, where, ceiling in measures():
        too_much = ceiling is not None and found > ceiling
        high |= too_much
        limit = "" if ceiling is None else f"at most {ceiling:g}"
        print(f"{'!' if too_much else ' '} {name:38} {found:6g}  {limit:12} {where}".rstrip())
    sys.exit(high)


if __name__ == "__main__":
    main()
