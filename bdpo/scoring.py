"""One pass of the reference model over the pairs: all that training and search need of it.

Four sums of log-probs a pair (both responses, with and without the query), the mutual information made
of them, and CHES, which tells how alike the model sees the responses. Nothing here depends on alpha, beta
or training, so every trial shares one scoring.
"""

from __future__ import annotations

import json
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from bdpo.attention import attention_of
from bdpo.ches import ches
from bdpo.config import Config, ModelConfig
from bdpo.data import PairReader, pair_ids, read_pairs
from bdpo.errors import UserError
from bdpo.logps import LogpsModel, pair_trees
from bdpo.mi import mutual_information
from bdpo.models import load_model, model_folder, weights_digest
from bdpo.packing import Tree, length_sorted_batches
from bdpo.runs import Fingerprint, RunDir, finished, read_manifest, write_manifest
from bdpo.shards import ShardStore
from bdpo.storage import error_line
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
        ("ches", pa.float32()),  # null where the architecture's hidden states are not known
    ]
)

# More pairs than these are not single bad rows but a model or a machine that is unfit: scoring stops.
MOST_UNSCORABLE = 16
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


def unscorable(run: RunDir, reasons: Mapping[int, str]) -> UserError:
    """The error that names the pairs (row -> reason) that cannot be scored."""
    rows = sorted(reasons)[:MOST_UNSCORABLE]
    ids = {row: read_pairs(run.pairs, row, 1)["pair_id"][0].as_py() for row in rows}
    named = "; ".join(f"pair_id {ids[row]} (row {row} of data/pairs): {reasons[row]}" for row in rows)
    if len(reasons) > MOST_UNSCORABLE:
        return UserError(f"score: stopped, more than {MOST_UNSCORABLE} pairs cannot be scored: {named}")
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


class ReferenceScorer:
    """The frozen reference model and what it says of pairs."""

    def __init__(self, config: Config, device: str) -> None:
        self.config = config
        self.chat = load_tokenizer(config.model)
        attention = attention_of(config, torch.device(device))
        model = load_model(model_folder(config.model), config.model, attention)
        self.model = LogpsModel(model, config.data.max_length).to(device).eval()
        self.unconditional = self.chat.unconditional_ids(config.score.unconditional)

    def score(self, pairs: pa.Table) -> pa.Table:
        """Rows of PAIR_SCHEMA -> rows of SCORE_SCHEMA, in the same order.

        Raises:
            FloatingPointError: a log-prob is not finite. In the others' company it may be theirs that is
                the cause: what a masked token contributes is 0 times its value.
        """
        encoded = encode_pairs(self.chat, pairs.to_pylist(), self.config.data)
        logps, alike = reference_logps(
            self.model, encoded, self.unconditional, self.config.score.tokens_per_batch
        )
        if not torch.stack(list(logps.values())).isfinite().all():
            raise FloatingPointError(f"a log-prob is not finite with model.dtype={self.config.model.dtype}")
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
        columns["ches"] = pa.array(alike.numpy(), from_pandas=True)
        return pa.table(columns, schema=SCORE_SCHEMA)


@torch.inference_mode()
def reference_logps(
    model: LogpsModel, pairs: Sequence[EncodedPair], unconditional: list[int], tokens_per_batch: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The four sums of log-probs of every pair, by column name, in nats, and CHES; NaN if not known.

    All are float32 on the CPU, shape (pairs,). When memory runs out, the batches that are left are planned
    again with half the tokens.
    """

    alike = torch.empty(len(pairs))

    def in_batches(trees: Sequence[Tree], means: bool = False) -> torch.Tensor:
        logps = torch.empty(len(trees), len(trees[0].responses))
        lengths = [tree.tokens(model.shared_rows) for tree in trees]
        batches = length_sorted_batches(lengths, tokens_per_batch)
        while batches:
            scored = _within_memory(model, [trees[i] for i in batches[0]], means)
            if scored is None:
                batches = _halved(batches, lengths)
            else:
                batch, *batches = batches
                if means:
                    scored, states = scored
                    alike[batch] = ches(*states.unflatten(0, (-1, 2)).unbind(1)).cpu()
                logps[batch] = scored.view(len(batch), -1).cpu()
        return logps.view(-1, 2)

    ref = in_batches(pair_trees(pairs), means=True)
    responses = [response for pair in pairs for response in (pair.chosen, pair.rejected)]
    uncond = in_batches([Tree(unconditional, [response]) for response in responses])
    return {
        "ref_chosen_logps": ref[:, 0],
        "ref_rejected_logps": ref[:, 1],
        "uncond_chosen_logps": uncond[:, 0],
        "uncond_rejected_logps": uncond[:, 1],
    }, alike


def _within_memory(model: LogpsModel, trees: Sequence[Tree], means: bool) -> Any:
    """The model's answer; None if memory does not suffice for so many trees, an exception if not for one."""
    try:
        return model(trees, means=means)
    except (RuntimeError, MemoryError) as error:
        if len(trees) == 1 or not out_of_memory(error):
            raise
    # Outside the handler: the exception held the frames, and they the tensors.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or on the CPU, where torch has no class for it."""
    signs = ("DefaultCPUAllocator", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")
    message = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in message for sign in signs)


def _halved(batches: list[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    """The same indices in batches of at most half the tokens of the first."""
    rest = [index for batch in batches for index in batch]
    budget = lengths[rest[0]] * len(batches[0]) // 2
    smaller = length_sorted_batches([lengths[index] for index in rest], budget)
    return [[rest[place] for place in batch] for batch in smaller]


def score_apart(
    score: Callable[[pa.Table], pa.Table], pairs: pa.Table
) -> Iterator[tuple[int, pa.Table | str]]:
    """Score all rows that can be scored: (offset, scores) of runs of rows, (offset, reason) of single ones.

    A table that cannot be scored whole is halved until the row is found. The reason quotes no message of
    an exception, which may hold a text.

    Raises:
        torch.AcceleratorError: the GPU is lost to this process, so no row can be blamed.
    """
    outcome = _attempt(score, pairs)
    if pairs.num_rows <= 1 or not isinstance(outcome, str):
        yield 0, outcome
        return
    half = pairs.num_rows // 2
    yield from score_apart(score, pairs.slice(0, half))
    for offset, part in score_apart(score, pairs.slice(half)):
        yield half + offset, part


def _attempt(score: Callable[[pa.Table], pa.Table], pairs: pa.Table) -> pa.Table | str:
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
    """Make sure that this node's model is the one whose name the scores will carry.

    Raises:
        UserError: it is another, and how.
    """
    here = {"weights": weights_digest(model_folder(model)), **tokenizer_fingerprint(model)}
    for field, value in here.items():
        if fingerprint[field] != value:
            raise UserError(
                f"model.name_or_path={model.name_or_path}: on host {socket.gethostname()} {field} differs "
                "from that where the run was begun; put the same files on all nodes, or set model.revision"
            )


class ShardScorer:
    """An actor of the scoring pool: reads a range of pairs, scores it, commits the shard itself."""

    def __init__(self, config: Config, run: RunDir, fingerprint: Fingerprint, device: str) -> None:
        self.run = run
        self.store = score_store(self.run, fingerprint)
        self.pairs = PairReader(run.pairs)
        self.stop = ""
        try:
            _require_same_reference(config.model, fingerprint)
            self.scorer = ReferenceScorer(config, device)
        except UserError as error:  # said by the first shard; raised here, Ray would try five times more
            self.stop = str(error)
        self.name = f"{socket.gethostname()}:{os.getpid()}"

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        """`{first, rows}` -> the same, once the scores of those rows lie in the run folder.

        `rows` are those that were scored; `unscorable` is JSON, row -> reason, of those that cannot be;
        `stop` says why nobody need try the next shard.
        """
        first, rows = int(shard["first"]), int(shard["rows"])
        unscorable: dict[int, str] = {}
        stop = self.stop
        try:
            pairs = self.pairs.read(first, rows)
            if pairs.num_rows < rows:
                stop = stop or (
                    f"run_dir={self.run.root}: host {socket.gethostname()} does not see all prepared pairs "
                    "there; it must be on storage that all nodes share"
                )
            # Ray Data gives a shard out again whose actor died after its commit.
            if not stop and not self.store.holds(first, rows):
                unscorable = self._commit(first, pairs)
        except torch.AcceleratorError:
            os._exit(1)  # a new process has a GPU again; the driver finds the row by what kills its actor
        except Exception as error:  # of the storage: what scoring raises is a reason
            stop = f"run_dir={self.run.root}: cannot be read or written ({error_line(error)})"
        scored = 0 if stop else rows - len(unscorable)
        return {"first": first, "rows": scored, "unscorable": json.dumps(unscorable), "stop": stop}

    def _commit(self, first: int, pairs: pa.Table) -> dict[int, str]:
        """Write the scores of all rows that can be scored; returns the others' reasons."""
        unscorable = {}
        started, forwarded = time.perf_counter(), self.scorer.model.tokens_forwarded
        for offset, outcome in score_apart(self.scorer.score, pairs):
            if isinstance(outcome, str):
                unscorable[first + offset] = outcome
                if len(unscorable) > MOST_UNSCORABLE:
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
            self.store.write(first + offset, outcome.replace_schema_metadata({_WORK_KEY: json.dumps(work)}))
        return unscorable


def real_tokens(scores: pa.Table) -> int:
    """Tokens that the four terms cannot do without: each prompt once, each response twice."""
    prompt, *responses = (
        pc.sum(scores[f"{part}_tokens"]).as_py() or 0 for part in ("prompt", "chosen", "rejected")
    )
    return int(prompt + 2 * sum(responses))
