"""Check the finished evaluations of a run against the conditions of a gate, for a team's CI.

    python -m pipelines.gate --config gate.yaml RUN_DIR [--out FILE]

Prints a table and writes the evidence as JSON to <run_dir>/report/gate.json, or to FILE. Nothing is evaluated
here: an evaluation that is unfinished or invalid meets no condition. Works on a local folder or one in a
bucket, without a cluster or a GPU.

exit code: 0 every condition is met; 3 one is not, which includes an evaluation that is not there; 2, with one
line, what cannot be read: a wrong gate file, no run folder, damaged results, a model that was changed since.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table
from rich.text import Text

from bdpo.config import Config
from bdpo.config.gate import GateConfig, load_gate
from bdpo.errors import UserError, error_line
from bdpo.evaluation.gate import Evidence, Outcome, check_gate, check_run
from bdpo.models.adapters import adapter_digest, adapter_folder
from bdpo.models.folders import recorded_weights_digest
from bdpo.models.loading import weights_digest
from bdpo.storage.checksums import require_checksums
from bdpo.storage.manifests import Fingerprint, read_manifest
from bdpo.storage.paths import StoragePath, local_path, storage_path, write_text
from bdpo.storage.records import training_record
from bdpo.storage.run_dir import RunDir, run_config
from pipelines.runtime.cli import exit_codes
from pipelines.runtime.progress import console

NOT_MET = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the gate")
    parser.add_argument("--out", metavar="FILE", help="where the evidence is written")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of the run, also on s3:// or gs://")
    given = parser.parse_args(arguments)
    with exit_codes():
        gate = load_gate(given.config)
        check_gate(gate, given.config)
        run = RunDir(given.run_dir)
        config = run_config(run)  # refuses a folder that is no run
        file = storage_path(given.out, "--out") if given.out else run.report / "gate.json"
        if not run_gate(gate, config, run, file):
            sys.exit(NOT_MET)


def run_gate(gate: GateConfig, config: Config, run: RunDir, file: StoragePath) -> bool:
    """Print every condition and write the evidence to `file`; whether all are met.

    Raises:
        UserError: an evaluation is damaged, or the evidence cannot be written.
    """
    names = {str(gate.model), str(gate.base)}
    weights = {name: weights_now(config, run, name) for name in names}
    outcomes = check_run(gate, {name: run.eval(name) for name in names}, weights, _stale(run, names))
    passed = all(outcome.met for outcome in outcomes)
    _write(file, gate, run, outcomes)
    console.print(_table(outcomes, gate.base))
    unmet = sum(not outcome.met for outcome in outcomes)
    verdict = "every condition is met" if passed else f"{unmet} of {len(outcomes)} conditions are not met"
    console.print(f"gate      {verdict}", style="bold green" if passed else "bold red")
    console.print(f"evidence  {file}", soft_wrap=True, markup=False)
    return passed


def weights_now(config: Config, run: RunDir, name: str) -> Fingerprint:
    """The digests of the weights that a model of the run has now, by field of an evaluation's fingerprint.

    A digest is None where there are no weights. What is on the hub has none.

    Raises:
        UserError: the model, or the adapter, is not as it was exported.
    """
    found: Fingerprint = {}
    if _is_looked_at(config, run, name):
        found["weights"] = _model_digest(_folder(config, run, name))
    if name == "adapter" and not _is_on_hub(config.evaluate.adapter):
        found["adapter"] = _adapter_digest(config.evaluate.adapter)
    return found


def _stale(run: RunDir, names: Collection[str]) -> Mapping[str, str]:
    """The tampered model, where it is not known to be made of the trained model that is there now."""
    if "tampered" not in names:
        return {}
    record = training_record(run.tampering(own_data=False))
    if record is not None and record.weights == _model_digest(run.model):
        return {}
    return {
        "tampered": "it is not known that the tamper test began with the trained model that is there; run "
        "it again with fresh=true"
    }


def _model_digest(folder: StoragePath) -> str | None:
    """That of a model in a bucket is not made anew: the one that was recorded at its export is taken."""
    if not isinstance(folder, Path):
        return recorded_weights_digest(folder)
    if not (folder / "config.json").is_file():
        return None
    require_checksums(folder)
    return weights_digest(folder)


def _adapter_digest(adapter: str | None) -> str | None:
    if adapter is None or not (local_path(adapter) / "adapter_config.json").is_file():
        return None
    return adapter_digest(adapter_folder(adapter, "evaluate.adapter"))


def _is_on_hub(adapter: str | None) -> bool:
    return (
        adapter is not None and not local_path(adapter).is_dir() and not adapter.startswith(("/", "~", "."))
    )


def _folder(config: Config, run: RunDir, name: str) -> StoragePath:
    if name == "trained":
        return run.model
    return (
        run.tampering(own_data=False).model if name == "tampered" else local_path(config.model.name_or_path)
    )


def _is_looked_at(config: Config, run: RunDir, name: str) -> bool:
    """Whether it is known which weights a model has: the run's own, and those of a local folder."""
    return name in ("trained", "tampered") or local_path(config.model.name_or_path).is_dir()


def _write(file: StoragePath, gate: GateConfig, run: RunDir, outcomes: Sequence[Outcome]) -> None:
    """The evidence: gate, outcomes, and the fingerprints of the evaluations that they were read from."""
    manifests = {name: read_manifest(run.eval(name) / "summary.json") for name in (gate.model, gate.base)}
    content = {
        "passed": all(outcome.met for outcome in outcomes),
        "run_dir": str(run.root),
        "gate": gate.model_dump(),
        "outcomes": [asdict(outcome) for outcome in outcomes],
        "evaluations": {name: found and found.fingerprint for name, found in manifests.items()},
    }
    try:
        write_text(file, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error_line(error)})") from None


def _table(outcomes: Sequence[Outcome], base: str) -> Table:
    table = Table(
        caption="percent (95 % interval, of a difference with the judge's error); n: items measured"
    )
    for column in ("condition", "judge", "n", "measured", "met"):
        table.add_column(column, justify="right" if column in ("n", "measured") else "left")
    for outcome in outcomes:
        n = str(outcome.evidence.n) if outcome.evidence else ""
        measured = _measured(outcome.evidence, base) if outcome.evidence else outcome.reason
        cells = (outcome.condition, outcome.judge, n, measured, "yes" if outcome.met else "NO")
        table.add_row(*(Text(cell) for cell in cells), style=None if outcome.met else "red")
    return table


def _measured(found: Evidence, base: str) -> str:
    sign = "" if found.base is None else "+"
    value, low, high = (f"{100 * number:{sign}.1f}" for number in (found.value, found.low, found.high))
    was = "" if found.base is None else f", {base} {100 * found.base:.1f}"
    error = "" if found.judge_error is None else f", judge's error ±{100 * found.judge_error:.1f}"
    return f"{value} ({low} to {high}){was}{error}"


if __name__ == "__main__":
    main()
