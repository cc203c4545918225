"""Preference data -> prepared pairs and an account of every row. Not a command: scoring begins with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bdpo.config import Config
from bdpo.data.pairs import count_pairs, read_pairs
from bdpo.data.prepare import prepare
from bdpo.data.sources import local_source
from bdpo.models.loading import require_positions
from bdpo.models.tokenizer import load_tokenizer, require_faithful_pairs, tokenizer_fingerprint
from bdpo.scoring.selection import require_labels
from bdpo.storage.digests import files_digest
from bdpo.storage.manifests import Fingerprint, finished, write_manifest
from bdpo.storage.paths import sorted_glob
from bdpo.storage.run_dir import RunDir
from pipelines.runtime.progress import console, progress_bar

FAITHFUL_PAIRS = 16  # about so many are compared with the template's own rendering of them


def run_prepare(config: Config, run: RunDir) -> dict[str, Any]:
    """Read, validate and write the pairs unless that is done; returns the account of the rows.

    Raises:
        UserError: the data cannot be used, or `method` wants safety labels that they lack.
    """
    require_positions(config)
    manifest_file = run.data / "manifest.json"
    fingerprint = _fingerprint(config)
    manifest = finished(manifest_file, fingerprint)
    chat = load_tokenizer(config.model)
    if manifest is None or manifest["pairs_digest"] != _pairs_digest(run):
        with progress_bar("prepare") as advance:
            account = prepare(config.data, chat, run.pairs, run.private, config.seed, advance)
        manifest = write_manifest(
            manifest_file, fingerprint, account=account, pairs_digest=_pairs_digest(run)
        )
    require_faithful_pairs(chat, _sample(run))
    console.print(f"[bold]pairs[/]     {account_line(manifest['account'])}", soft_wrap=True)
    require_labels(config, run)
    return manifest


def account_line(account: dict[str, Any]) -> str:
    """One line that accounts for every row: read = kept + quarantined + excluded + not sampled."""
    parts = [f"{account['rows']} rows read ({account['format']}) = {account['kept']} kept"]
    for fate in ("quarantined", "excluded"):
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(account[fate].items()))
        parts.append(f"{sum(account[fate].values())} {fate}" + (f" ({reasons})" if reasons else ""))
    if account["not_sampled"]:
        parts.append(f"{account['not_sampled']} not sampled")
    return " + ".join(parts)


def _fingerprint(config: Config) -> Fingerprint:
    data = config.data
    source = local_source(data)
    return {
        "data.path": files_digest(sorted(source.rglob("*.*")), source)
        if source.is_dir()
        else _digest_or_name(source),
        "data.format": data.format,
        "data.split": data.split,
        "data.limit": data.limit,
        "data.sample": data.sample and {**data.sample, "seed": config.seed},
        "data.max_length": data.max_length,
        "data.max_prompt_length": data.max_prompt_length,
        **tokenizer_fingerprint(config.model),
    }


def _sample(run: RunDir) -> Iterator[dict[str, Any]]:
    """Some prepared pairs, from the first to the last."""
    pairs = count_pairs(run.pairs)
    for first in range(0, pairs, max(1, pairs // FAITHFUL_PAIRS)):
        yield from read_pairs(run.pairs, first, 1).to_pylist()


def _pairs_digest(run: RunDir) -> str:
    return files_digest(sorted_glob(run.pairs, "*.parquet"))


def _digest_or_name(source: Path) -> str:
    """The content of a file; of a data set on the hub only the name is known before it is loaded."""
    return files_digest([source]) if source.is_file() else str(source)
