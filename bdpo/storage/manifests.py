"""Manifests: the last file that a stage writes, with the fingerprint of all its inputs.

A manifest carries a digest of itself, which is checked when it is read; see `bdpo.storage.sealed`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bdpo.errors import UserError
from bdpo.storage.paths import StoragePath, read_bytes, write_text
from bdpo.storage.sealed import sealed, unsealed

Fingerprint = dict[str, Any]  # field name -> JSON value

VERSION = 1  # of what manifests hold and of the results that they stand for


@dataclass(frozen=True)
class Manifest(Mapping[str, Any]):
    """Facts about the results of a stage, by name, and the fingerprint of the inputs behind them."""

    fingerprint: Fingerprint
    facts: Mapping[str, Any]

    def __getitem__(self, fact: str) -> Any:
        return self.facts[fact]

    def __iter__(self) -> Iterator[str]:
        return iter(self.facts)

    def __len__(self) -> int:
        return len(self.facts)


def write_manifest(file: StoragePath, fingerprint: Fingerprint, **facts: Any) -> Manifest:
    """Mark a stage as finished, with the fingerprint of its inputs and facts about its results."""
    manifest = {"version": VERSION, "fingerprint": fingerprint, **facts}
    write_text(file, sealed(manifest, indent=2, sort_keys=True) + "\n")
    return Manifest(fingerprint, facts)


def read_manifest(file: StoragePath) -> Manifest | None:
    """The manifest of a stage, None if the stage is not finished.

    Raises:
        UserError: the file is damaged or not a manifest, or was written by another version of bdpo.
    """
    try:
        facts = unsealed(read_bytes(file))
        version, fingerprint = facts.pop("version"), facts.pop("fingerprint")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{file}: not a manifest of this version of bdpo, or damaged; "
            "use another run_dir, or fresh=true to start over"
        ) from None
    if version != VERSION:
        raise UserError(
            f"{file}: version={version}, this bdpo reads and writes {VERSION}; "
            "use another run_dir, or fresh=true to start over"
        )
    return Manifest(fingerprint, facts)


def read_facts(file: StoragePath) -> Mapping[str, Any]:
    """The facts in the manifest of a stage; none if the stage is not finished.

    Raises:
        UserError: as `read_manifest`.
    """
    manifest = read_manifest(file)
    return {} if manifest is None else manifest.facts


def finished(file: StoragePath, fingerprint: Fingerprint) -> Manifest | None:
    """The manifest if the stage is done with these inputs, None if it is not done.

    Raises:
        UserError: it was done with other inputs; the message names the first field that differs.
    """
    manifest = read_manifest(file)
    if manifest is not None:
        require_same_fingerprint(file, manifest.fingerprint, fingerprint)
    return manifest


def require_same_fingerprint(what: object, made_with: Fingerprint, now: Fingerprint) -> None:
    """Raise a UserError that names the first field in which two fingerprints differ, if any does."""
    for field in {**now, **made_with}:
        old, new = made_with.get(field), now.get(field)
        if old != new:
            raise UserError(
                f"{what}: made with {field}={old}, now it is {new}; "
                "use another run_dir, or fresh=true to start over"
            )
