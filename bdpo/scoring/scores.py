"""The score table: its schema, its fingerprint, and how finished scores are read back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bdpo.config import Config
from bdpo.data.pairs import pair_ids, read_pairs
from bdpo.errors import UserError
from bdpo.models.loading import model_folder, weights_digest
from bdpo.models.tokenizer import tokenizer_fingerprint
from bdpo.storage.manifests import Fingerprint, finished, read_manifest, write_manifest
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
        ("ches", pa.float32()),  # null where the architecture's hidden states are not known
    ]
)

# More pairs than these are not single bad rows but a model or a machine that is unfit: scoring stops.
MAX_UNSCORABLE = 16

_WORK_KEY = b"bdpo.work"


def score_fingerprint(config: Config, run: RunDir) -> Fingerprint:
    """Everything that the scores depend on, field by field.

    Raises:
        UserError: the pairs are not prepared yet.
    """
    prepared = read_manifest(run.data / "manifest.json")
    if prepared is None:
        raise UserError(f"{run.data}: no prepared pairs; run `python -m pipelines.score` first")
    return {
        "weights": weights_digest(model_folder(config.model)),
        **tokenizer_fingerprint(config.model),
        "unconditional": config.score.unconditional,
        "max_length": config.data.max_length,
        "max_prompt_length": config.data.max_prompt_length,
        "dtype": config.model.dtype,
        "pairs": prepared["pairs_digest"],
    }


def score_store(run: RunDir, fingerprint: Fingerprint) -> ShardStore:
    """The shards of scores in a run folder."""
    return ShardStore(run.scores, SCORE_SCHEMA, fingerprint)


def finish_scores(run: RunDir, fingerprint: Fingerprint, seconds: float) -> dict[str, Any]:
    """Check that every pair has its row, then write the manifest, last; `seconds` is what it took.

    Pairs and scores are read part by part, ids alone. The manifest's `workers` say of each worker how many
    `pairs` and `tokens` it scored, how many `tokens_forwarded` that took, and its busy `seconds`.

    Raises:
        RuntimeError: rows are missing, repeated, or belong to other pairs.
    """
    rows = 0
    workers: dict[str, dict[str, float]] = {}

    def scored_ids() -> Iterator[str]:
        for shard in score_store(run, fingerprint).tables(["pair_id"]):
            work = json.loads(shard.schema.metadata[_WORK_KEY])
            done = workers.setdefault(work.pop("worker"), {"pairs": 0, **dict.fromkeys(work, 0)})
            for name, amount in {"pairs": shard.num_rows, **work}.items():
                done[name] += amount
            yield from shard["pair_id"].to_pylist()

    for pair, scored in zip_longest(pair_ids(run.pairs), scored_ids()):
        if pair != scored:
            raise RuntimeError(
                f"{run.scores}: row {rows} is not that of the pair in row {rows}; "
                "if the same command says so again, fresh=true starts over"
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
        f"score: {len(reasons)} pairs cannot be scored, all others are: {named}; mend the cause and the same "
        "command scores these alone, or leave them out of data.path and start over with fresh=true"
    )


def read_scores(config: Config, run: RunDir) -> pa.Table:
    """The finished scores of a run, one row a pair, in the order of the pairs.

    Raises:
        UserError: they are not there, or were made with another model, tokenizer, data or setting.
    """
    finished(run.scores / "manifest.json", score_fingerprint(config, run))
    return finished_scores(run)[1]


def finished_scores(run: RunDir) -> tuple[dict[str, Any], pa.Table]:
    """(manifest, scores) of a finished run folder as they lie there; neither model nor data are needed.

    Raises:
        UserError: the scores are not finished.
    """
    manifest = read_manifest(run.scores / "manifest.json")
    scores = score_store(run, manifest["fingerprint"]).read() if manifest else None
    if manifest is None or scores is None or scores.num_rows != manifest["rows"]:
        raise UserError(f"{run.scores}: no finished scores; run `python -m pipelines.score` first")
    return manifest, scores


def real_tokens(scores: pa.Table) -> int:
    """Tokens that the four terms cannot do without: each prompt once, each response twice."""
    prompt, *responses = (
        pc.sum(scores[f"{part}_tokens"]).as_py() or 0 for part in ("prompt", "chosen", "rejected")
    )
    return int(prompt + 2 * sum(responses))
