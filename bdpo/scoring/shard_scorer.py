"""Scoring one shard of pairs in an actor; a shard with a pair that cannot be scored is bisected."""

from __future__ import annotations

import json
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import torch

from bdpo.config import Config, ModelConfig
from bdpo.data.pairs import PairReader
from bdpo.errors import UserError, error_line
from bdpo.models.layers import before_each_layer
from bdpo.models.loading import model_folder, weights_digest
from bdpo.models.oom import out_of_memory
from bdpo.models.tokenizer import tokenizer_fingerprint
from bdpo.scoring.reference import ReferenceScorer
from bdpo.scoring.scores import MAX_UNSCORABLE, WORK_KEY, real_tokens, score_store
from bdpo.storage.manifests import Fingerprint
from bdpo.storage.run_dir import RunDir
from bdpo.storage.shards import Shard, ShardActor


def score_with_bisection(
    score: Callable[[pa.Table], pa.Table], pairs: pa.Table
) -> Iterator[tuple[int, pa.Table | str]]:
    """Score all rows that can be scored; yields (offset, scores) of runs of rows, (offset, reason) of others.

    A table that cannot be scored at once is halved until the row at fault is found. A reason never quotes the
    message of an exception, which may contain text of the pair.

    Raises:
        torch.AcceleratorError: this process has lost its GPU, so that no row is at fault.
    """
    outcome = _try_score(score, pairs)
    if pairs.num_rows <= 1 or not isinstance(outcome, str):
        yield 0, outcome
        return
    half = pairs.num_rows // 2
    yield from score_with_bisection(score, pairs.slice(0, half))
    for offset, part in score_with_bisection(score, pairs.slice(half)):
        yield half + offset, part


def _try_score(score: Callable[[pa.Table], pa.Table], pairs: pa.Table) -> pa.Table | str:
    try:
        return score(pairs)
    except torch.AcceleratorError:
        raise
    except FloatingPointError as error:
        return str(error)
    except Exception as error:
        if out_of_memory(error):
            return "out of memory, alone in its batch"
        raised_at = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(raised_at.filename).name}:{raised_at.lineno}"


def _require_same_reference(model: ModelConfig, fingerprint: Fingerprint) -> None:
    """Check that the model on this node is the one in the fingerprint of the scores.

    Raises:
        UserError: it is another model; the message names the field that differs.
    """
    here = {"weights": weights_digest(model_folder(model)), **tokenizer_fingerprint(model)}
    for field, value in here.items():
        if fingerprint[field] != value:
            raise UserError(
                f"model.name_or_path={model.name_or_path}: on host {socket.gethostname()} {field} differs "
                "from where the run was begun; put the same files on all nodes, or set model.revision"
            )


class ShardReport(Shard):
    """The result of a shard; `rows` counts the rows that were scored."""

    unscorable: str
    """JSON, row -> reason, of the rows that cannot be scored."""


class ShardScorer(ShardActor):
    """An actor of the scoring pool: reads a range of pairs, scores it, and commits the shard itself.

    Raises:
        UserError: the model on this node is not the one that the scoring was begun with, or cannot be loaded.
    """

    def __init__(self, config: Config, run: RunDir, fingerprint: Fingerprint, device: str) -> None:
        self.run = run
        self.store = score_store(self.run, fingerprint)
        self.pairs = PairReader(run.pairs)
        _require_same_reference(config.model, fingerprint)
        self.scorer = ReferenceScorer(config, device)
        self.done = 0.0  # of the rows of the shard
        before_each_layer(self.scorer.model, lambda: self.progress(self.done))
        self.name = f"{socket.gethostname()}:{os.getpid()}"

    def __call__(self, shard: Shard) -> ShardReport:
        """A report, once the scores of the shard are in the run folder.

        Raises:
            UserError: the run folder cannot be read or written, or this node does not see all of it.
        """
        first, rows = int(shard["first"]), int(shard["rows"])
        unscorable: dict[int, str] = {}
        try:
            pairs = self.pairs.read(first, rows)
            if pairs.num_rows < rows:
                raise UserError(
                    f"run_dir={self.run.root}: host {socket.gethostname()} does not see all prepared pairs "
                    "there; it must be on storage that all nodes share"
                )
            # If an actor dies after its commit, Ray Data assigns the shard again.
            if not self.store.holds(first, rows):
                unscorable = self._commit(first, pairs)
        except torch.AcceleratorError:
            os._exit(1)  # a new process gets the GPU back; the driver finds the row that kills its actors
        except UserError:
            raise
        except Exception as error:  # of the storage: exceptions of the scoring are reasons already
            raise UserError(
                f"run_dir={self.run.root}: cannot be read or written ({error_line(error)})"
            ) from None
        return {"first": first, "rows": rows - len(unscorable), "unscorable": json.dumps(unscorable)}

    def _commit(self, first: int, pairs: pa.Table) -> dict[int, str]:
        """Write the scores of every row that can be scored; returns the reasons of the others by row."""
        unscorable: dict[int, str] = {}
        ended = 0  # of the rows, those that were scored or cannot be

        def score(part: pa.Table) -> pa.Table:
            return self.scorer.score(part, lambda rows: self._done(ended + rows))

        self._done(0)
        started, forwarded = time.perf_counter(), self.scorer.model.tokens_forwarded
        for offset, outcome in score_with_bisection(score, pairs):
            ended = offset + (1 if isinstance(outcome, str) else outcome.num_rows)
            if isinstance(outcome, str):
                unscorable[first + offset] = outcome
                if len(unscorable) > MAX_UNSCORABLE:
                    break
                continue
            now, forwarded_now = time.perf_counter(), self.scorer.model.tokens_forwarded
            work = {
                "worker": self.name,
                "seconds": now - started,
                "tokens": real_tokens(outcome),
                "tokens_forwarded": forwarded_now - forwarded,
            }
            started, forwarded = now, forwarded_now
            self.store.write(first + offset, outcome.replace_schema_metadata({WORK_KEY: json.dumps(work)}))
        return unscorable

    def _done(self, rows: float) -> None:
        self.done = rows
        self.progress(rows)
