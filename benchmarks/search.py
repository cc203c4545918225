"""The search on the sandbox: its best trial against the default alpha and beta, on wrappers neither saw.

    OMP_NUM_THREADS=1 python -m benchmarks.search [--seeds 0 1 2] [--runs runs/search]

For each seed (of world, base model and training) a sweep of `tune-sandbox.yaml` and a run of the config as it
stands, both resumed if they were begun. Also the minutes of each sweep, what a trial costs beside its
training and evaluations, and the start-up of its training beside that of a training alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from statistics import median

import pyarrow.parquet as pq

from bdpo.evaluation.compare import compare
from bdpo.evaluation.results import read_evaluation
from bdpo.evaluation.tables import percent
from bdpo.storage.manifests import read_manifest
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.paths import write_text
from bdpo.storage.run_dir import RunDir
from benchmarks.common import write_section

CONFIG = "pipelines/configs/tune-sandbox.yaml"
RESUMED = "resumed"  # a file in the folder of a sweep that was not done in one go


def main() -> None:
    """Run what is missing and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", default="runs/search")
    arguments = parser.parse_args()
    rows, overheads, starts, alone = [], [], [], []
    for seed in arguments.seeds:
        sweep = RunDir(f"{arguments.runs}-{seed}")
        default = RunDir(f"{arguments.runs}-{seed}-default")
        same = [f"seed={seed}", f"model.revision={seed}"]
        if (sweep.tune / "begun.json").exists() and not (sweep.tune / "summary.json").exists():
            write_text(sweep.tune / RESUMED, "")
        _run("tune.search", f"run_dir={sweep.root}", *same)
        _run("pipelines.run", f"run_dir={default.root}", *same, "evaluate.part=held_out")
        rows.append(_row(seed, sweep, default))
        for overhead, start in _beside(sweep):
            overheads.append(overhead)
            starts.append(start)
        trained = read_manifest(default.train / "manifest.json")
        assert trained is not None
        alone.append(trained["seconds"] - _steps(default))
    table = [
        "| seed | best alpha, beta | safety, default | safety, best | best − default | p "
        "| compliance, base | compliance, default | compliance, best | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        "Held-out jailbreak wrappers, percent (95 % interval), 80 prompts each; the difference is paired. "
        "Minutes from the first trial's beginning to the last rung.",
        f"Seconds of a trial beside its training and evaluations: median {median(overheads):.1f}, largest "
        f"{max(overheads):.1f}, of {len(overheads)} trials. Not in it is the start-up that every "
        "training has: the imports of its worker and its controller, once a trial and not once a rung. "
        f"With the saving of checkpoints and models it is median {median(starts):.0f}, largest "
        f"{max(starts):.0f} seconds, two trials at a time on two cores; of the default's training, alone, "
        f"median {median(alone):.0f}, largest {max(alone):.0f}.",
    ]
    print(*table, sep="\n")
    write_section("Search", table)


def _run(module: str, *overrides: str) -> None:
    subprocess.run([sys.executable, "-m", module, "--config", CONFIG, *overrides], check=True)


def _row(seed: int, sweep: RunDir, default: RunDir) -> str:
    found = json.loads((sweep.tune / "summary.json").read_text())
    models = {
        "base": sweep.search_base("held_out").eval("base"),
        "default": default.eval("trained"),
        "best": sweep.part("tune", "trials", found["best"]).eval("trained"),
    }
    read = {name: read_evaluation(folder) for name, folder in models.items()}
    [difference] = [
        row for row in compare(read["default"].scores, read["best"].scores) if row.measure == "safety"
    ]
    safety = {name: e.summary.estimate("strongreject.safety") for name, e in read.items()}
    compliance = {name: e.summary.estimate("xstest.compliance") for name, e in read.items()}
    cells = [
        str(seed),
        ", ".join(f"{value:g}" for value in found["params"].values()),
        percent(safety["default"]),
        f"**{percent(safety['best'])}**",
        f"{100 * difference.difference.difference:+.1f}",
        f"{difference.difference.p:.2g}",
        *(percent(compliance[name]) for name in ("base", "default", "best")),
        _minutes(sweep),
    ]
    return f"| {' | '.join(cells)} |"


def _minutes(sweep: RunDir) -> str:
    """Durations of the trials; meaningless for a sweep that was interrupted."""
    if (sweep.tune / RESUMED).exists():
        return "resumed"
    rows = pq.read_table(sweep.tune / "results.parquet").to_pylist()
    manifests = [read_manifest(file) for file in (sweep.tune / "trials").glob("*/trial.json")]
    begun = min(manifest["begun"] for manifest in manifests if manifest is not None)
    return f"{(max(row['finished'] or begun for row in rows) - begun) / 60:.1f}"


def _steps(run: RunDir) -> float:
    """Seconds of a training's optimizer steps."""
    log = MetricsLog(run.metrics).read()
    tokens = [0.0, *(step["num_tokens"] for step in log)]
    return sum(
        (after - before) / step["tokens_per_second"]
        for before, after, step in zip(tokens, tokens[1:], log, strict=False)
    )


def _beside(sweep: RunDir) -> list[tuple[float, float]]:
    """Seconds of every trial with a rung: itself beside training and evaluations, training beside steps."""
    seconds = []
    for row in pq.read_table(sweep.tune / "results.parquet").to_pylist():
        run = sweep.part("tune", "trials", row["trial"])
        begun = read_manifest(run.root / "trial.json")
        if begun is None or row["finished"] is None:
            continue
        train, whole = row["train_seconds"], row["finished"] - begun["begun"]
        seconds.append((whole - train - row["evaluate_seconds"], train - _steps(run)))
    return seconds


if __name__ == "__main__":
    main()
