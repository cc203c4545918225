"""Preference data -> prepared pairs and an account of every row. Not a command: scoring begins with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bdpo.cluster.status import StageStatus
from bdpo.data.account import account_line
from bdpo.data.pairs import PAIR_SCHEMA, count_pairs, pairs_digest, read_pairs
from bdpo.storage.manifests import Fingerprint, Manifest, write_manifest
from bdpo.storage.paths import StoragePath
from bdpo.storage.records import PreparedRows
from pipelines.runtime.progress import console, progress_bar
from pipelines.runtime.stage import ManifestStage

if TYPE_CHECKING:
    from bdpo.cluster.preflight import Check

FAITHFUL_PAIRS = 16  # about so many are compared with the template's own rendering of them


class Prepare(ManifestStage):
    """Reads, checks and writes the preference pairs."""

    name = "prepare"

    @property
    def manifest_file(self) -> StoragePath:
        """The account of the rows, and the digest of the pairs."""
        return self.run.data / "manifest.json"

    def outputs(self) -> list[StoragePath]:
        """Pairs and manifest."""
        return [self.run.data]

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """The content of the source, how it is read, and the tokenizer that measures it."""
        from bdpo.data.sources import sources_fingerprint
        from bdpo.models.tokenizer import tokenizer_fingerprint

        data = self.config.data
        return {
            "pair_columns": ", ".join(PAIR_SCHEMA.names),
            **sources_fingerprint(data.sources()),
            "data.sample": data.sample and {**data.sample, "seed": self.config.seed},
            "data.max_length": data.max_length,
            "data.max_prompt_length": data.max_prompt_length,
            **tokenizer_fingerprint(self.config.model),
        }

    def has_results(self, manifest: Manifest) -> bool:
        """Whether so many pairs are there as were kept."""
        return count_pairs(self.run.pairs) == int(manifest["account"]["kept"])

    def is_intact(self, manifest: Manifest) -> bool:
        """Whether the pairs are those that were written."""
        return bool(manifest["pairs_digest"] == pairs_digest(self.run.pairs))

    def complete(self) -> Manifest:
        """Read, check and write the pairs unless that is done; returns the manifest, with the account.

        Raises:
            UserError: the data cannot be used, or `method` requires safety labels that they lack.
        """
        from bdpo.data.fidelity import require_faithful_pairs
        from bdpo.models.loading import require_positions
        from bdpo.models.tokenizer import load_tokenizer
        from bdpo.scoring.selection import require_benign_pairs, require_labels

        require_positions(self.config)
        manifest = self.ensure_manifest()
        chat = load_tokenizer(self.config.model)
        compared = require_faithful_pairs(chat, self._sample(), self.config.data)
        account = account_line(manifest["account"])
        console.print(
            f"[bold]pairs[/]     {account}; {compared} compared with the chat template", soft_wrap=True
        )
        require_labels(self.config, self.run)
        require_benign_pairs(self.config, self.run)
        return manifest

    def make(self) -> Manifest:
        """Read, check and write the pairs."""
        from bdpo.data.prepare import prepare
        from bdpo.models.tokenizer import load_tokenizer

        run, config = self.run, self.config
        with progress_bar("prepare") as advance:
            chat = load_tokenizer(config.model)
            account = prepare(config.data, chat, run.pairs, run.private, config.seed, advance)
        results = {"account": account.to_json(), "pairs_digest": pairs_digest(self.run.pairs)}
        return write_manifest(self.manifest_file, self.fingerprint, **results)

    def status(self) -> StageStatus:
        """Rows that were read, pairs that were kept, rows that are quarantined."""
        manifest = self.recorded()
        if manifest is None:
            return StageStatus.of(self.name, done=False, begun=self.manifest_file.is_file())
        account: PreparedRows = manifest["account"]
        facts = {"rows": account["rows"], "pairs": account["kept"]}
        quarantined = sum(account["quarantined"].values())
        return StageStatus.of(self.name, done=True, begun=True, **facts, quarantined=quarantined)

    def input_checks(self) -> Mapping[str, Check]:
        """Model and data can be read."""
        from bdpo.cluster.preflight import check_data, check_model

        return {"model": check_model, "data": check_data}

    def further_checks(self) -> Mapping[str, Check]:
        """The chat template writes the first pairs as it should."""
        from bdpo.cluster.preflight import check_template

        return {"template": check_template}

    def _sample(self) -> Iterator[dict[str, Any]]:
        """Some prepared pairs, from the first to the last; there is always one."""
        pairs = count_pairs(self.run.pairs)
        for first in range(0, pairs, max(1, pairs // FAITHFUL_PAIRS)):
            yield from read_pairs(self.run.pairs, first, 1).to_pylist()
