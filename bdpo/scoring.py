"""One pass of the reference model over the pairs: all that training and search need of it.

Four sums of log-probs a pair (both responses, with and without the query) and the mutual information
made of them. Nothing here depends on alpha, beta or training, so every trial shares one scoring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch

from bdpo.config import Config
from bdpo.data import count_pairs, read_pairs
from bdpo.errors import UserError
from bdpo.logps import LogpsModel, pair_trees
from bdpo.mi import mutual_information
from bdpo.models import load_model, model_folder, weights_digest
from bdpo.packing import Tree, length_sorted_batches
from bdpo.runs import Fingerprint, RunDir, finished, read_manifest, write_manifest
from bdpo.shards import ShardStore
from bdpo.storage import StoragePath
from bdpo.tokens import EncodedPair, encode_pairs, load_tokenizer, tokenizer_fingerprint

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
    ]
)


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

    Raises:
        RuntimeError: rows are missing, repeated, or belong to other pairs.
    """
    rows = count_pairs(run.pairs)
    scores = score_store(run, fingerprint).read()
    if scores["pair_id"].to_pylist() != read_pairs(run.pairs, 0, rows)["pair_id"].to_pylist():
        raise RuntimeError(f"{run.scores}: {scores.num_rows} rows that are not those of the {rows} pairs")
    return write_manifest(run.scores / "manifest.json", fingerprint, rows=rows, seconds=seconds)


def read_scores(config: Config, run: RunDir) -> pa.Table:
    """The finished scores of a run, one row a pair, in the order of the pairs.

    Raises:
        UserError: they are not there, or were made with another model, tokenizer, data or setting.
    """
    fingerprint = score_fingerprint(config, run)
    manifest = finished(run.scores / "manifest.json", fingerprint)
    scores = score_store(run, fingerprint).read()
    if manifest is None or scores.num_rows != manifest["rows"]:
        raise UserError(f"{run.scores}: no finished scores; run `python -m pipelines.score` first")
    return scores


class ReferenceScorer:
    """The frozen reference model and what it says of pairs."""

    def __init__(self, config: Config, device: str) -> None:
        self.config = config
        self.chat = load_tokenizer(config.model)
        model = load_model(model_folder(config.model), config.model)
        self.model = LogpsModel(model, config.data.max_length).to(device).eval()
        self.unconditional = self.chat.unconditional_ids(config.score.unconditional)

    def score(self, pairs: pa.Table) -> pa.Table:
        """Rows of PAIR_SCHEMA -> rows of SCORE_SCHEMA, in the same order."""
        encoded = encode_pairs(self.chat, pairs.to_pylist(), self.config.data)
        logps = reference_logps(self.model, encoded, self.unconditional, self.config.score.tokens_per_batch)
        columns: dict[str, Any] = {
            "pair_id": pairs["pair_id"],
            "group": pairs["group"],
            "prompt_tokens": torch.tensor([len(pair.prompt) for pair in encoded]),
            "chosen_tokens": torch.tensor([len(pair.chosen) for pair in encoded]),
            "rejected_tokens": torch.tensor([len(pair.rejected) for pair in encoded]),
            **logps,
        }
        for side in ("chosen", "rejected"):
            columns[f"mi_{side}"] = mutual_information(
                logps[f"ref_{side}_logps"], logps[f"uncond_{side}_logps"], columns[f"{side}_tokens"]
            )
        columns = {name: c.numpy() if isinstance(c, torch.Tensor) else c for name, c in columns.items()}
        return pa.table(columns, schema=SCORE_SCHEMA)


@torch.inference_mode()
def reference_logps(
    model: LogpsModel, pairs: Sequence[EncodedPair], unconditional: list[int], tokens_per_batch: int
) -> dict[str, torch.Tensor]:
    """The four sums of log-probs of every pair, by column name: nats, float32 on the CPU, shape (pairs,)."""

    def in_batches(trees: Sequence[Tree]) -> torch.Tensor:
        logps = torch.empty(len(trees), len(trees[0].responses))
        lengths = [tree.tokens(model.shared_rows) for tree in trees]
        for batch in length_sorted_batches(lengths, tokens_per_batch):
            logps[batch] = model([trees[i] for i in batch]).view(len(batch), -1).cpu()
        return logps.view(-1, 2)

    ref = in_batches(pair_trees(pairs))
    responses = [response for pair in pairs for response in (pair.chosen, pair.rejected)]
    uncond = in_batches([Tree(unconditional, [response]) for response in responses])
    return {
        "ref_chosen_logps": ref[:, 0],
        "ref_rejected_logps": ref[:, 1],
        "uncond_chosen_logps": uncond[:, 0],
        "uncond_rejected_logps": uncond[:, 1],
    }


class ShardScorer:
    """An actor of the scoring pool: reads a range of pairs, scores it, commits the shard itself."""

    def __init__(self, config: Config, run_dir: StoragePath, fingerprint: Fingerprint, device: str) -> None:
        self.run = RunDir(run_dir)
        self.store = score_store(self.run, fingerprint)
        self.scorer = ReferenceScorer(config, device)

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        """`{first, rows}` -> the same, once the scores of those rows lie in the run folder."""
        first, rows = int(shard["first"]), int(shard["rows"])
        self.store.write(first, self.scorer.score(read_pairs(self.run.pairs, first, rows)))
        return {"first": first, "rows": rows}
