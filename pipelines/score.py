"""Mutual-information scoring: Ray Data shards the pairs over a pool of reference-model actors.

    python -m pipelines.score --config pipelines/configs/sandbox.yaml [section.key=value ...]
    python -m pipelines.score --config pipelines/configs/sandbox.yaml --inspect

Reads `data.path`, writes <run_dir>/data/pairs and <run_dir>/scores. An actor commits each shard itself,
so the same command after a kill scores only what is missing. A pair that cannot be scored is named when
all others are scored. --inspect shows the distribution of the mutual information in a finished run folder,
and what every actor did.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bdpo.cluster.status import StageStatus, count_shards
from bdpo.data.pairs import count_pairs
from bdpo.scoring.scores import (
    MAX_UNSCORABLE,
    finish_scores,
    finished_scores,
    score_fingerprint,
    score_store,
    unscorable_error,
)
from bdpo.scoring.selection import requires_scores
from bdpo.storage.manifests import Fingerprint, Manifest
from bdpo.storage.paths import StoragePath, discard
from bdpo.storage.records import prepared_pairs
from pipelines.prepare import Prepare
from pipelines.runtime.cli import Command
from pipelines.runtime.pool import ATTEMPTS, RayPool, Shards, ShardWork, may_be_lost
from pipelines.runtime.progress import console
from pipelines.runtime.stage import ManifestStage

if TYPE_CHECKING:
    from bdpo.cluster.preflight import Check

# A shard that kills its actors comes again in so many pieces, and each of those in so many.
FINER = 32


class Score(ManifestStage):
    """Scores every prepared pair with the reference model."""

    name = "score"
    section = "score"

    @property
    def applies(self) -> bool:
        """Whether the method, or `data.select`, looks at scores."""
        return requires_scores(self.config)

    @property
    def manifest_file(self) -> StoragePath:
        """What was scored with what, and by which workers."""
        return self.run.scores / "manifest.json"

    def outputs(self) -> list[StoragePath]:
        """Shards and manifest."""
        return [self.run.scores]

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Weights, tokenizer, contexts, lengths, dtype and pairs."""
        return score_fingerprint(self.config, self.run)

    @cached_property
    def _pairs(self) -> int:
        return count_pairs(self.run.pairs)

    def _missing(self, shard_rows: int, given_up: Mapping[int, str] | None = None) -> Shards:
        return score_store(self.run, self.fingerprint).missing(self._pairs, shard_rows, given_up or {})

    def has_results(self, manifest: Manifest) -> bool:
        """Whether every pair has a row of scores."""
        return count_shards(self.run.scores)[1] == self._pairs

    def is_intact(self, manifest: Manifest) -> bool:
        """Whether no shard was lost or damaged since."""
        return not self._missing(self.config.score.shard_rows)

    def complete(self) -> Manifest:
        """Score the prepared pairs unless that is done; returns the manifest of the scores."""
        manifest = self.ensure_manifest()
        console.print(f"[bold]scores[/]    {manifest['rows']} pairs")
        return manifest

    def make(self) -> Manifest:
        """Score what is missing."""
        discard(self.manifest_file)  # with it the stage would count as done
        started = time.perf_counter()
        self._score_in_rounds()
        return finish_scores(self.run, self.fingerprint, time.perf_counter() - started)

    def status(self) -> StageStatus:
        """Rows and shards of scores."""
        pairs, (shards, rows) = prepared_pairs(self.run), count_shards(self.run.scores)
        done = self.recorded() is not None
        return StageStatus.of(self.name, done, begun=shards > 0, rows=rows, of=pairs, shards=shards)

    def input_checks(self) -> Mapping[str, Check]:
        """The model can be read."""
        from bdpo.cluster.preflight import check_model

        return {"model": check_model}

    def inspect(self) -> None:
        """Print the finished scores of a run folder as tables.

        Raises:
            UserError: there are none.
        """
        from bdpo.reports.scores import mi_tables, work_table

        manifest, scores = finished_scores(self.run)
        made_with = manifest.fingerprint
        for table in (*mi_tables(scores, self.config.method), work_table(manifest["workers"])):
            console.print(table, "")
        console.print(
            f"{manifest['rows']:,} pairs, {made_with['dtype']}, unconditional={made_with['unconditional']}, "
            f"at most {made_with['max_length']} tokens, weights {made_with['weights'][:12]}",
            soft_wrap=True,
        )

    def _score_in_rounds(self) -> None:
        """Score what is missing, in rounds: what failed with its actors comes again, at last row by row.

        Raises:
            UserError: pairs cannot be scored, and all others are; or the run folder cannot be written.
        """
        reasons: dict[int, str] = {}  # of rows that cannot be scored
        missing = self._missing(self.config.score.shard_rows)
        before = sum(rows for _, rows in missing)
        self._say_if_rows_are_plain()
        for number, size in enumerate(_rounds(self.config.score.shard_rows)):
            if number:
                missing = self._missing(size, reasons)
            if not missing:
                break
            if number:
                rows = sum(rows for _, rows in missing)
                console.print(f"{rows} pairs were lost with their actors; again, {size} in a shard")
            self._score_shards(missing, reasons, queue=1 if number else 2)
        else:
            alone = self._missing(1, reasons)
            if len(alone) == before > 1:
                raise RuntimeError(
                    "every actor died, whatever it was given to score: it is not the pairs; Ray's log files "
                    "of the workers say why (session_latest/logs/worker-*.err)"
                )
            reasons |= {row: f"its actor died of it, {ATTEMPTS} times alone" for row, _ in alone}
        if reasons:
            raise unscorable_error(self.run, reasons)

    def _score_shards(self, missing: Shards, reasons: dict[int, str], queue: int) -> None:
        """Give the shards to the pool; `reasons` gets the rows that an actor could not score."""
        from bdpo.scoring.shard_scorer import ShardScorer

        def note(shard: dict[str, Any]) -> None:
            reasons.update({int(row): reason for row, reason in json.loads(shard["unscorable"]).items()})
            if len(reasons) > MAX_UNSCORABLE:
                raise unscorable_error(self.run, reasons)

        settings = self.config.score
        arguments = {"config": self.config, "run": self.run, "fingerprint": self.fingerprint}
        store = score_store(self.run, self.fingerprint)
        work = ShardWork("score", ShardScorer, arguments, store, self._pairs, settings.shard_rows)
        may_fail = MAX_UNSCORABLE + may_be_lost(settings.workers)
        RayPool.of("score", settings).make_shards(work, missing, may_fail, queue, note)

    def _say_if_rows_are_plain(self) -> None:
        from bdpo.models.loading import model_config
        from bdpo.models.row_layout import prefix_sharing_obstacle

        why = prefix_sharing_obstacle(model_config(self.config.model), self.config.data.max_length)
        if why:
            console.print(f"every response has a row of its own: {why}", soft_wrap=True)


def _rounds(shard_rows: int) -> Iterator[int]:
    """Rows in a shard, round by round: the same once more, as the machine may be the cause; then fewer."""
    yield shard_rows
    while shard_rows > 1:
        yield shard_rows
        shard_rows = max(1, shard_rows // FINER)
    yield 1


main = Command(__doc__, (Prepare, Score))

if __name__ == "__main__":
    main()
