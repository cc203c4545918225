"""The score table: its schema, its fingerprint, its manifest, and reading finished scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import zip_longest

import pyarrow as pa
import pyarrow.compute as pc

from bdpo.config import Config
from bdpo.data.pairs import pair_ids, pairs_digest, read_pairs
from bdpo.errors import UserError
from bdpo.models.loading import model_folder, weights_digest
from bdpo.models.tokenizer import tokenizer_fingerprint
from bdpo.storage.manifests import Fingerprint, Manifest, finished, read_manifest, write_manifest
from bdpo.storage.run_dir import RunDir
from bdpo.storage.shards import ShardStore

SCORE_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("group", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("chosen_tokens", pa.int32()),
        ("rejected_tokens", pa.int32()),
        ("ref_chosen_logps", pa.float32()),
        ("ref_rejected_logps", pa.float32()),
        ("uncond_chosen_logps", pa.float32()),
        ("uncond_rejected_logps", pa.float32()),
        ("mi_chosen", pa.float32()),
        ("mi_rejected", pa.float32()),
        ("ches", pa.float32()),  # null if the architecture's hidden states are unknown
    ]
)

TOKEN_COLUMNS = ["prompt_tokens", "chosen_tokens", "rejected_tokens"]

# More unscorable pairs than these mean an unfit model or machine, not single bad rows: scoring stops.
MAX_UNSCORABLE = 16

# Key of the Parquet metadata under which a shard records the work that it took, as JSON.
WORK_KEY = b"bdpo.work"


def score_fingerprint(config: Config, run: RunDir) -> Fingerprint:
    """Everything that the scores depend on, field by field.

    Raises:
        UserError: the pairs are not prepared yet, or were changed since; see `checked_pairs_digest`.
    """
    return {
        "weights": weights_digest(model_folder(config.model)),
        **tokenizer_fingerprint(config.model),
        "unconditional": config.score.unconditional,
        "max_length": config.data.max_length,
        "max_prompt_length": config.data.max_prompt_length,
        "dtype": config.model.dtype,
        "pairs": checked_pairs_digest(run),
    }


def checked_pairs_digest(run: RunDir) -> str:
    """The digest of the prepared pairs, computed from their files and compared with their manifest.

    Every stage that reads the pairs begins with this, by way of the fingerprint of the scores: a training on
    pairs that were changed after the scoring would combine texts with the scores of other texts.

    Raises:
        UserError: there are no prepared pairs, or they are not those that were prepared.
    """
    prepared = read_manifest(run.data / "manifest.json")
    if prepared is None:
        raise UserError(f"{run.data}: no prepared pairs; run `python -m pipelines.score` first")
    digest = pairs_digest(run.pairs)
    if digest != prepared["pairs_digest"]:
        raise UserError(
            f"{run.pairs}: the pairs were changed or damaged after they were prepared; "
            "`python -m pipelines.score` prepares them again"
        )
    return digest


def score_store(run: RunDir, fingerprint: Fingerprint) -> ShardStore:
    """The store of the score shards in a run folder."""
    return ShardStore(run.scores, SCORE_SCHEMA, fingerprint)


def finish_scores(run: RunDir, fingerprint: Fingerprint, seconds: float) -> Manifest:
    """Check that every pair has its row, then write the manifest; `seconds` is the duration of the stage.

    Pairs and scores are read part by part, ids alone. The manifest's `workers` hold the number of `pairs`
    and `tokens` that each worker scored, of `tokens_forwarded` for them, and its busy `seconds`.

    Raises:
        RuntimeError: rows are missing, repeated, or belong to other pairs.
    """
    rows = 0
    workers: dict[str, dict[str, float]] = {}

    def scored_ids() -> Iterator[str]:
        for shard in score_store(run, fingerprint).tables(["pair_id"]):
            work = json.loads(shard.schema.metadata[WORK_KEY])
            done = workers.setdefault(work.pop("worker"), {"pairs": 0, **dict.fromkeys(work, 0)})
            for name, amount in {"pairs": shard.num_rows, **work}.items():
                done[name] += amount
            yield from shard["pair_id"].to_pylist()

    for pair, scored in zip_longest(pair_ids(run.pairs), scored_ids()):
        if pair != scored:
            raise RuntimeError(
                f"{run.scores}: row {rows} does not belong to the pair in row {rows}; "
                "if the same command reports this again, fresh=true starts over"
            )
        rows += 1
    return write_manifest(
        run.scores / "manifest.json", fingerprint, rows=rows, seconds=seconds, workers=workers
    )


def unscorable_error(run: RunDir, reasons: Mapping[int, str]) -> UserError:
    """The error that names the pairs (row -> reason) that cannot be scored."""
    rows = sorted(reasons)[:MAX_UNSCORABLE]
    ids = {row: read_pairs(run.pairs, row, 1)["pair_id"][0].as_py() for row in rows}
    named = "; ".join(f"pair_id {ids[row]} (row {row} of data/pairs): {reasons[row]}" for row in rows)
    if len(reasons) > MAX_UNSCORABLE:
        return UserError(f"score: stopped, more than {MAX_UNSCORABLE} pairs cannot be scored: {named}")
    return UserError(
        f"score: {len(reasons)} pairs cannot be scored, all others are: {named}; fix the cause, and "
        "the same command scores these alone, or remove them from data.path and start over with fresh=true"
    )


def read_scores(config: Config, run: RunDir) -> pa.Table:
    """The finished scores of a run, one row a pair, in the order of the pairs.

    Raises:
        UserError: there are none, or they were computed with another model, tokenizer, data or setting.
    """
    finished(run.scores / "manifest.json", score_fingerprint(config, run))
    return finished_scores(run)[1]


def finished_scores(run: RunDir) -> tuple[Manifest, pa.Table]:
    """(manifest, scores) of a run folder with finished scores; neither model nor data are needed.

    Raises:
        UserError: the scores are not finished.
    """
    manifest = read_manifest(run.scores / "manifest.json")
    scores = score_store(run, manifest.fingerprint).read() if manifest else None
    if manifest is None or scores is None or scores.num_rows != manifest["rows"]:
        raise UserError(f"{run.scores}: no finished scores; run `python -m pipelines.score` first")
    return manifest, scores


def real_tokens(scores: pa.Table) -> int:
    """The least number of tokens for the four sums: each prompt once, each response twice."""
    prompt, *responses = (
        pc.sum(scores[f"{part}_tokens"]).as_py() or 0 for part in ("prompt", "chosen", "rejected")
    )
    return int(prompt + 2 * sum(responses))
