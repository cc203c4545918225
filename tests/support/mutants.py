"""Small changes to the code, and whether the tests of the changed module notice them.

    python -m tests.support.mutants [bdpo/training/batches.py ...] [--count 6] [--seed 0]

A mutant is a module in which one operator, condition, number or statement is changed. pytest collects the
tests of the module once; each mutant is a forked process, in which the functions of the module get the
changed code before the tests run until the first of them fails. A mutant is `caught` if a test fails, `hung`
if the tests take a minute and five times as long as without a change, and `survived` otherwise, or
`explained` if `EXPLAINED` says why no test can, or has to, notice it. Commands that a test starts have the
unchanged code.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import multiprocessing
import os
import random
import signal
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from _pytest.main import pytest_runtestloop as run_tests

from tests.support import ROOT
from tests.support.explained_mutants import EXPLAINED

TESTS = {
    "bdpo/evaluation/answers": "tests/evaluation/test_answers.py tests/evaluation/test_samples.py",
    "bdpo/evaluation/capability": "tests/evaluation/test_capability.py",
    "bdpo/evaluation/compare": "tests/evaluation/test_compare.py",
    "bdpo/evaluation/gate": "tests/pipelines/test_gate.py",
    "bdpo/evaluation/measures": "tests/evaluation/test_measures.py tests/evaluation/test_compare.py",
    "bdpo/evaluation/responses": "tests/evaluation/test_answers.py tests/evaluation/test_in_memory.py",
    "bdpo/evaluation/tables": "tests/evaluation/test_measures.py tests/evaluation/test_compare.py "
    "tests/evaluation/test_twins.py",
    "bdpo/evaluation/texts": "tests/evaluation/test_texts.py",
    "bdpo/evaluation/twins": "tests/evaluation/test_twins.py",
    "bdpo/method/base": "tests/method/test_losses.py",
    "bdpo/method/ches": "tests/method/test_ches.py",
    "bdpo/method/losses": "tests/method/test_losses.py",
    "bdpo/method/mi": "tests/method/test_mi.py",
    "bdpo/method/reference_free": "tests/method/test_losses.py",
    "bdpo/scoring/reference": "tests/scoring/test_reference.py tests/models/test_logps.py",
    "bdpo/scoring/scores": "tests/scoring/test_scores.py tests/scoring/test_reference.py",
    "bdpo/scoring/selection": "tests/scoring/test_selection.py",
    "bdpo/scoring/shard_scorer": "tests/scoring/test_reference.py tests/storage/test_shards.py",
    "bdpo/search/space": "tests/search/test_space.py tests/search/test_suggest.py tests/search/test_sweep.py",
    "bdpo/search/suggest": "tests/search/test_suggest.py",
    "bdpo/search/sweep": "tests/search/test_sweep.py",
    "bdpo/search/trials": "tests/search/test_trials.py tests/search/test_sweep.py "
    "tests/pipelines/test_variants.py",
    "bdpo/storage/cache": "tests/storage/test_paths.py",
    "bdpo/storage/checksums": "tests/storage/test_checksums.py",
    "bdpo/storage/digests": "tests/storage/test_run_dir.py tests/models/test_loading.py",
    "bdpo/storage/lease": "tests/storage/test_paths.py",
    "bdpo/storage/limits": "tests/storage/test_s3.py",
    "bdpo/storage/manifests": "tests/storage/test_run_dir.py tests/storage/test_flipped_bytes.py",
    "bdpo/storage/metrics_log": "tests/storage/test_metrics_log.py tests/storage/test_flipped_bytes.py",
    "bdpo/storage/paths": "tests/storage/test_paths.py tests/storage/test_run_dir.py",
    "bdpo/storage/run_dir": "tests/storage/test_run_dir.py tests/storage/test_paths.py",
    "bdpo/storage/s3": "tests/storage/test_s3.py",
    "bdpo/storage/sealed": "tests/storage/test_sealed.py",
    "bdpo/storage/shards": "tests/storage/test_shards.py",
    "bdpo/training/batches": "tests/training/test_batches.py",
    "bdpo/training/checkpoints": "tests/training/test_checkpoints.py tests/training/test_lora.py",
    "bdpo/training/engine": "tests/training/test_engine.py tests/training/test_loop.py "
    "tests/training/test_lora.py",
    "bdpo/training/export": "tests/training/test_export.py",
    "bdpo/training/loop": "tests/training/test_loop.py tests/training/test_engine.py "
    "tests/training/test_checkpoints.py tests/training/test_lora.py tests/training/test_rungs.py",
    "bdpo/training/memory": "tests/training/test_memory.py",
    "bdpo/training/resharding": "tests/training/test_resharding.py",
    "bdpo/training/rungs": "tests/training/test_rungs.py",
    "pipelines/runtime/ray_internals/elastic": "tests/pipelines/test_elastic.py",
    "pipelines/runtime/faults": "tests/pipelines/test_faults.py tests/pipelines/test_ray_internals.py",
    "pipelines/runtime/ray_internals/__init__": "tests/pipelines/test_ray_internals.py",
    "pipelines/runtime/node_processes": "tests/pipelines/test_node_processes.py",
    "pipelines/runtime/recovery": "tests/pipelines/test_recovery.py tests/pipelines/test_ray_internals.py",
    "pipelines/runtime/signals": "tests/pipelines/test_signals.py",
    "pipelines/runtime/stalls": "tests/pipelines/test_stalls.py",
    "pipelines/runtime/work_times": "tests/pipelines/test_work_times.py",
}
"""The tests of each module that is tried: those that are quick and closest to it."""

_LONGEST = 600.0
"""Seconds that the tests of a module may take."""

Change = Callable[[ast.AST], None]

_OTHER: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or,
    ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}  # fmt: skip

_PLAIN = (int, float, str, tuple, dict, list)

_SMALL, _SHOWN = (ast.Constant, ast.Name, ast.UnaryOp), (ast.expr, ast.stmt, ast.keyword)

_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """A module with one change: its source, and what was changed in which line."""

    module: Path
    line: int
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line}: {self.before}  ->  {self.after}"


def mutants(module: Path) -> Iterator[Mutant]:
    """Every mutant of a module of the project."""
    text = (ROOT / module).read_text(encoding="utf-8")
    original = list(ast.walk(ast.parse(text)))
    numbers = {id(node): number for number, node in enumerate(original)}
    around = {
        numbers[id(child)]: i for i, node in enumerate(original) for child in ast.iter_child_nodes(node)
    }
    types_of = (getattr(part, "annotation", None) or getattr(part, "returns", None) for part in original)
    left_alone = [*filter(_is_left_alone, original), *filter(None, types_of)]
    silent = {id(node) for part in left_alone for node in ast.walk(part)}
    for number, node in enumerate(original):
        if id(node) in silent:
            continue
        shown = number  # of a number alone nobody could tell which of the line it is
        while isinstance(original[shown], _SMALL) and isinstance(original[around[shown]], _SHOWN):
            shown = around[shown]
        for change in _changes(node):
            tree = ast.parse(text)
            changed = list(ast.walk(tree))
            before = ast.unparse(changed[shown])
            change(changed[number])
            ast.fix_missing_locations(tree)
            line, after = getattr(node, "lineno", 0), ast.unparse(changed[shown])
            yield Mutant(module, line, _short(before), _short(after), ast.unparse(tree))


def _is_left_alone(node: ast.AST) -> bool:
    """Messages, annotations, what only a type checker reads, and guards against our own faults.

    The constraints of a pydantic field and the columns of a schema are left alone as well: they have been
    made by then.
    """
    checked_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    is_guard = isinstance(node, ast.keyword) and node.arg in ("strict", "frozen")
    is_field = isinstance(node, ast.Call) and ast.unparse(node.func) in ("Field", "pa.schema")
    return isinstance(node, ast.JoinedStr | ast.arg) or checked_only or is_guard or is_field


def _changes(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.Compare):
        yield lambda n: n.ops.__setitem__(0, _OTHER[type(n.ops[0])]())  # type: ignore[attr-defined]
    if isinstance(node, ast.BoolOp | ast.BinOp | ast.AugAssign) and type(node.op) in _OTHER:
        yield lambda n: setattr(n, "op", _OTHER[type(n.op)]())  # type: ignore[attr-defined]
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield lambda n: setattr(n, "test", _negated(n.test))  # type: ignore[attr-defined]
    if isinstance(node, ast.comprehension) and node.ifs:
        yield lambda n: n.ifs.pop()  # type: ignore[attr-defined]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield lambda n: setattr(n, "operand", ast.UnaryOp(n.op, n.operand))  # type: ignore[attr-defined]
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield _other_number
    if isinstance(node, ast.Name) and node.id in _NAMES:
        yield lambda n: setattr(n, "id", _NAMES[n.id])  # type: ignore[attr-defined]
    is_call = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
    if is_call or isinstance(node, ast.Raise | ast.AugAssign | ast.Continue | ast.Break):
        yield lambda n: setattr(n, "__class__", ast.Pass)


def _negated(test: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), test)


def _other_number(node: ast.AST) -> None:
    assert isinstance(node, ast.Constant)
    value = node.value
    node.value = (
        not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else 2 * value + 1
    )  # type: ignore[operator]


def _short(code: str) -> str:
    line = " ".join(code.split())
    return line if len(line) <= 160 else f"{line[:160]}…"


def explanation(mutant: Mutant) -> str | None:
    """Why no test has to notice a mutant, if that is known."""
    of_module = EXPLAINED.get(str(mutant.module), {})
    return of_module.get(f"{mutant.before}  ->  {mutant.after}")


def apply(mutant: Mutant) -> None:
    """Give the functions of the imported module the mutant's code, and its constants their values."""
    name = ".".join(mutant.module.with_suffix("").parts)
    module = importlib.import_module(name)
    changed = types.ModuleType(name)
    changed.__dict__.update(__file__=module.__file__, __package__=module.__package__)
    exec(compile(mutant.source, str(mutant.module), "exec"), changed.__dict__)
    _replace(vars(module), vars(changed), lambda key, value: setattr(module, key, value))


def _replace(old: Any, new: Any, constant: Callable[[str, Any], None]) -> None:
    """The same of the members of a module or class: functions in place, since others have imported them."""
    for key, value in dict(new).items():
        before, after = _function(old.get(key)), _function(value)
        if before is not None and after is not None:
            before.__code__, before.__defaults__ = after.__code__, after.__defaults__
            before.__kwdefaults__ = after.__kwdefaults__
        elif isinstance(value, type) and isinstance(old.get(key), type):
            if value.__module__ == old[key].__module__:
                of_class = functools.partial(setattr, old[key])
                _replace(vars(old[key]), vars(value), of_class)
        elif isinstance(value, _PLAIN) and not key.startswith("__") and old.get(key) != value:
            constant(key, value)


def _function(member: Any) -> types.FunctionType | None:
    """The function behind decorators, properties, class methods and validators."""
    for _ in range(9):
        if isinstance(member, types.FunctionType) and not hasattr(member, "__wrapped__"):
            return member
        wrapped = ("__wrapped__", "__func__", "fget", "func", "wrapped")
        member = next((getattr(member, name) for name in wrapped if getattr(member, name, None)), None)
    return None


class EveryMutant:
    """A plugin of pytest that runs the collected tests for each mutant instead of once."""

    def __init__(self, mutants: list[Mutant]) -> None:
        self.mutants, self.counts = mutants, Counter[str]()
        self.seconds = _LONGEST

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Print what comes of each mutant; nothing is tried if the tests fail without a change."""
        forks = importlib.import_module("tests.support.forks")
        forks._FORKS = multiprocessing.get_context("fork")  # of this process, with the changed code
        for mutant in (None, *self.mutants):
            begun = time.monotonic()
            what = self.outcome(session, mutant)
            if what != "caught" and mutant is not None and explanation(mutant):
                what = "explained"
            self.counts[what] += mutant is not None
            seconds = time.monotonic() - begun
            if mutant is None:
                self.seconds = min(_LONGEST, 60 + 5 * seconds)
            print(f"{what:9}{seconds:5.0f} s  {mutant or 'no change'}", file=sys.stderr, flush=True)
            if mutant is None and what != "survived":
                self.counts["not tried"] += 1
                break
        return True

    def outcome(self, session: pytest.Session, mutant: Mutant | None) -> str:
        """`survived`, `caught` or `hung`: what a process that runs the tests comes to."""
        begun, pid = time.monotonic(), os.fork()
        if pid == 0:
            self._run(session, mutant)
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            if time.monotonic() - begun > self.seconds:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return "hung"
            time.sleep(0.02)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what the tests have started
        return "survived" if ended[1] == 0 else "caught"

    def _run(self, session: pytest.Session, mutant: Mutant | None) -> None:
        """In the forked process, which ends here."""
        os.setsid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        failed = True
        try:
            if mutant is not None:
                apply(mutant)
            run_tests(session)
            failed = session.testsfailed > 0
        finally:
            os._exit(int(failed))


def try_module(module: Path, arguments: argparse.Namespace) -> Counter[str]:
    """Every drawn mutant of a module; outcome -> number."""
    found = [each for each in mutants(module) if arguments.line in (None, each.line)]
    drawn = random.Random(arguments.seed).sample(found, min(arguments.count, len(found)))
    every = EveryMutant(sorted(drawn, key=lambda each: each.line))
    options = ["-x", "-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0"]
    marks = ["-m", "not ray" if arguments.system else "not ray and not system"]
    pytest.main([*options, *marks, *TESTS[str(module.with_suffix(""))].split()], plugins=[every])
    return every.counts


def main() -> int:
    """Print what came of each mutant, and the counts; 1 if the tests of a module fail without a change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("modules", nargs="*", type=Path, help="by default every one that `TESTS` names")
    parser.add_argument("--count", type=int, default=6, help="mutants of each module, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--line", type=int, help="the mutants of this line alone")
    parser.add_argument("--system", action="store_true", help="with the tests marked `system` as well")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    counts = Counter[str]()
    for module in arguments.modules or [Path(f"{name}.py") for name in TESTS]:
        counts += try_module(module, arguments)
    tried = sum(counts.values()) - counts["not tried"]
    found = ", ".join(f"{what}: {number}" for what, number in sorted(counts.items()))
    print(f"{tried} mutants, {found}")
    return int(counts["not tried"] > 0)


if __name__ == "__main__":
    sys.exit(main())
