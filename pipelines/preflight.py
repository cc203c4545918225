"""What will run where, and what would go wrong, before a GPU is taken.

    python -m pipelines.preflight --config my.yaml [section.key=value ...] [--tokens-per-second N | --measure]
    python -m pipelines.preflight --upload FOLDER

The first looks at model, data, benchmarks, chat template, batches, storage, judge, at an attack if the config
has one, and asks every node of the cluster what it is; exit 2 if a run would fail. The hours are computed
from a stated throughput of scoring, in tokens a second of one worker, or from one measured for 20 seconds on
a worker of the cluster.
The second shows what `ray job submit --working-dir FOLDER` would upload.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from bdpo.cluster.node_checks import NODE_CHECKS
from bdpo.cluster.preflight import (
    Check,
    CheckResult,
    Doubt,
    check_storage,
    examine,
    expected_hours,
    measure_throughput,
)
from bdpo.config import Config
from bdpo.config.secrets import looks_secret
from bdpo.errors import UserError
from bdpo.models.tokenizer import with_template
from bdpo.sandbox import with_sandbox_files
from bdpo.storage.run_dir import RunDir
from pipelines.presets import preset_file
from pipelines.runtime.admission import ask_nodes, room_checks
from pipelines.runtime.cli import command_config, exit_codes
from pipelines.runtime.cluster import connect
from pipelines.runtime.progress import console
from pipelines.runtime.ray_internals import pack_working_dir
from pipelines.runtime.registry import ATTACKS, PIPELINE, STUDIES
from pipelines.runtime.stage import input_checks

MAX_UPLOAD_MIB = 100  # Ray's own limit is 512
MEASURE_SECONDS = 1800.0  # for a worker of `score`: a node that is started, a model that is downloaded
_SHOWN = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "error": "[bold red]error[/]"}


def preflight(config: Config, run: RunDir, throughput: float | None, measure: bool) -> list[CheckResult]:
    """Every result, the local ones first: a cluster is not asked about what is wrong here."""
    results = list(examine(local_checks(config, run), config, run))
    connect()
    results += examine(room_checks(config, run), config, run)
    storage_works = all(result.level != "error" for result in results if result.check == "storage")
    nodes, silent = ask_nodes(config, run if storage_works else None)
    if silent:
        text = f"no answer from {', '.join(silent)}: they are left out, and so they may be of the run"
        results.append(CheckResult("nodes", "warning", text))
    results += examine(NODE_CHECKS, config, run, nodes)
    if all(result.level != "error" for result in results):
        results += examine({"time": _time}, config, run, throughput, measure)
    return results


def local_checks(config: Config, run: RunDir) -> dict[str, Check]:
    """What the stages ask of their inputs, and of the run folder: it needs no cluster."""
    pipeline, others = ([kind(config, run) for kind in kinds] for kinds in (PIPELINE, STUDIES + ATTACKS))
    stages = [*pipeline, *others]
    further = {name: check for stage in stages for name, check in stage.further_checks().items()}
    return {**input_checks(pipeline), **further, "storage": check_storage}


def _time(config: Config, run: RunDir, throughput: float | None, measure: bool) -> str | Doubt:
    if measure:
        import ray

        gpus = config.score.gpus_per_worker
        task = ray.remote(num_cpus=1, num_gpus=gpus)(measure_throughput)
        console.print("measuring for 20 seconds ...")
        try:
            throughput = ray.get(task.remote(config, "cuda" if gpus else "cpu"), timeout=MEASURE_SECONDS)
        except ray.exceptions.GetTimeoutError:
            raise UserError(
                f"no worker has measured within {MEASURE_SECONDS / 60:.0f} minutes; is one free?"
            ) from None
    return expected_hours(config, run, throughput)


def check_upload(folder: Path) -> str:
    """What a job's working directory would upload, as Ray packs it.

    Raises:
        UserError: it is too much, or a file is called like a secret.
    """
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "package.zip"
        pack_working_dir(folder, package)
        mib = package.stat().st_size / 2**20
        with zipfile.ZipFile(package) as packed:
            files = sorted(packed.infolist(), key=lambda file: -file.compress_size)
    for file in files:
        name = Path(file.filename)
        if (
            name.name.startswith(".env")
            or name.suffix in (".pem", ".key")
            or (not name.suffix and looks_secret(name.name))
        ):
            raise UserError(
                f"{folder / name}: looks like a secret, and would be uploaded; list it in .rayignore"
            )
    if mib > MAX_UPLOAD_MIB:
        raise UserError(
            f"{folder}: {mib:.0f} MiB would be uploaded, more than {MAX_UPLOAD_MIB}; the largest "
            f"is {files[0].filename}: list it in .rayignore, and put data and models on shared storage"
        )
    return f"{len(files)} files, {mib:.1f} MiB"


def print_results(results: Sequence[CheckResult]) -> None:
    """The table, one row per check."""
    table = Table(title="preflight", title_justify="left")
    table.add_column("check")
    table.add_column("")
    table.add_column("found, and what to do", overflow="fold")
    for result in results:
        table.add_row(result.check, _SHOWN[result.level], result.text)
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="YAML file of the run")
    what.add_argument("--preset", metavar="NAME", help="a config of this package, see `bdpo presets`")
    what.add_argument("--upload", type=Path, metavar="FOLDER", help="show what a job would upload")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument(
        "--tokens-per-second", type=float, metavar="N", help="throughput of one scoring worker"
    )
    speed.add_argument("--measure", action="store_true", help="measure it for 20 seconds on the cluster")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over the file")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit 0 if a run can begin, 2 if it would fail."""
    given = _parser().parse_args(arguments)
    with exit_codes():
        if given.upload:
            results = list(examine({"upload": check_upload}, given.upload))
        else:
            file = given.config or preset_file(given.preset)
            config = with_template(with_sandbox_files(command_config(file, given.overrides)))
            run = RunDir(config.run_dir)
            results = preflight(config, run, given.tokens_per_second, given.measure)
        print_results(results)
        errors = sum(result.level == "error" for result in results)
        if errors:
            raise UserError(f"{errors} of {len(results)} checks found what would stop the run")


if __name__ == "__main__":
    main()
