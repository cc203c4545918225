"""The engine of experiments and searches: Ray Tune runs variants at the same time and retries them.

How many run at the same time, the actors that run them, retries, the record of how each ends, the table on
the terminal and the interrupt are the same for both; `pipelines.runtime.variant_protocol` has what differs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.live import Live

from bdpo.cluster.placement import max_concurrent
from bdpo.config.derive import part_of
from bdpo.errors import UserError
from bdpo.evaluation.answers import planned_items
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.paths import StoragePath, arrow_filesystem, discard
from bdpo.variants.ends import Failure
from bdpo.variants.objective import check_measures
from pipelines.runtime.cluster import cluster_nodes, connect
from pipelines.runtime.progress import console
from pipelines.runtime.stalls import watching
from pipelines.runtime.variant_protocol import Limits, Variants

if TYPE_CHECKING:
    from bdpo.config import Config
    from bdpo.storage.run_dir import RunDir


def check_evaluation(config: Config, who: str, searched: bool) -> str:
    """Variants can be evaluated as section `evaluate` asks for and, if they are `searched`, ranked by it.

    Raises:
        UserError: they cannot; `who`, a sweep or an experiment, asks for it.
    """
    if config.evaluate.engine != "transformers":
        raise UserError(f"evaluate.engine: {who} evaluates with engine=transformers")
    if searched:
        check_measures(config)
    parts = [part_of(config, part) for part in ("search", "held_out")] if searched else [config]
    return f"{sum(len(planned_items(part)) for part in parts)} prompts"


def require_room(config: Config, run: RunDir, todo: int, key: str, share: float = 0.0) -> int:
    """How many of `todo` variants run at the same time, at most the value of `key`; see `max_concurrent`.

    Raises:
        UserError: the cluster can never hold one; nothing has been scored or trained by then.
    """
    from pipelines.runtime.admission import refuse_what_does_not_fit
    from pipelines.runtime.plan_table import require_memory

    require_memory(config)
    refuse_what_does_not_fit(config, run)
    return max_concurrent(config, cluster_nodes(), todo, key, share)


def print_failures(kind: str, failures: Mapping[str, Failure]) -> None:
    """A line for each variant without a result; `kind` is what a variant is called, `arm` or `trial`."""
    for name, failure in failures.items():
        again = "; the same command tries it again" if failure.retried else ""
        line = f"{kind} {name}: {failure.end}: {failure.error}{again}"
        console.print(line, style="red", soft_wrap=True, markup=False)


def run_variants(variants: Variants, folder: StoragePath, todo: int, limits: Limits) -> None:
    """Run `todo` variants; each is at its end afterwards, or its failure is recorded.

    `folder` is for Tune's own files, which are removed at the end: a resumed command reads those of the
    variants alone. A process of a variant that stands still while it evaluates is killed, and its variant is
    run again like any whose process died.

    Raises:
        NoRoom: the cluster had no room for the process of a variant within the limit.
    """
    connect()
    from pipelines.runtime.variant_actor import tuner_of

    # Tune's own files, tables and tracebacks would repeat what the variants' files and table show.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # else Tune returns, as if all variants were done
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    discard(folder / "ray")
    console.print(f"[bold]{variants.title:<9}[/] {todo} to do, {limits.concurrent} at the same time")
    # The table is made of the files of all variants: on object storage each of them is a request.
    looks = 1 if isinstance(folder, Path) else 1 / MetricsLog.WRITE_SECONDS
    with (
        Live(get_renderable=variants.table, console=console, refresh_per_second=looks, transient=True),
        watching(variants.title, limits.stall_seconds) as watched,
    ):
        tuner = tuner_of(variants, arrow_filesystem(folder), todo, limits, watched.watch)
        watched.wait(tuner.fit)
    discard(folder / "ray")
