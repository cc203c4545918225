"""The token ids of all prepared pairs in one array, which the processes of a machine map into their memory.

Training reads pairs in random order, in every epoch and every trial. From Parquet each worker would decode
all of them into memory of its own; the pages of a mapped file are read when they are used, and shared.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bdpo.data.pairs import ID_COLUMNS, pair_tables, prefix_groups
from bdpo.errors import UserError, error_line
from bdpo.storage.cache import cache_folder, machine_lock
from bdpo.storage.checksums import CHECKSUMS, require_checksums, write_checksums
from bdpo.storage.manifests import read_facts
from bdpo.storage.paths import StoragePath, atomic_folder, discard
from bdpo.storage.run_dir import RunDir

if TYPE_CHECKING:
    from bdpo.models.packing import PrefixGroups

KEPT = 4
"""A machine keeps the ids of so many sets of pairs, the newest ones."""

_FILES = ("ids.i32", "lengths.i32")


def mapped_groups(run: RunDir) -> PrefixGroups:
    """`[c(x) | y_w | y_l]` of all prepared pairs of a run, in order.

    The first process of a machine copies the ids into a folder of the machine's cache, named by the digest of
    the pairs in their manifest: a file of all ids and one of all lengths, int32, whose digests are checked.

    Raises:
        UserError: the ids cannot be read, or the cache not be written.
    """
    from bdpo.models.packing import PrefixGroups

    digest, copies = read_facts(run.data / "manifest.json")["pairs_digest"], cache_folder() / "tokens"
    try:
        copies.mkdir(parents=True, exist_ok=True, mode=0o700)  # ids are texts
        with machine_lock(copies.with_suffix(".lock")):
            folder = copies / digest
            if not _is_intact(folder):
                _make_room(copies)
                _copy(run.pairs, folder)
            ids, lengths = (np.asarray(np.memmap(folder / name, np.int32, mode="r")) for name in _FILES)
    except OSError as error:
        raise UserError(
            f"{run.pairs}: the token ids cannot be copied to {copies} (BDPO_CACHE): {error_line(error)}"
        ) from None
    return PrefixGroups.in_a_row(ids, lengths.reshape(-1, 3))


def _is_intact(folder: Path) -> bool:
    """Whether the copy is there and its content is what was written."""
    try:
        require_checksums(folder)
    except UserError:
        return False
    return (folder / CHECKSUMS).is_file()


def _make_room(copies: Path) -> None:
    """Remove what killed processes have left, and the oldest copies."""
    oldest_first = sorted(copies.glob("[!.]*"), key=lambda path: path.stat().st_mtime)
    # A process that has mapped a file keeps it until it ends.
    discard(*oldest_first[: 1 - KEPT], *copies.glob(".*"))


def _copy(pairs: StoragePath, folder: Path) -> None:
    """Write the copy of these pairs, complete or not at all; a damaged one is replaced."""
    with atomic_folder(folder) as unfinished:
        with ExitStack() as open_files:
            ids, lengths = (open_files.enter_context((unfinished / name).open("wb")) for name in _FILES)
            for table in pair_tables(pairs, ID_COLUMNS):
                groups = prefix_groups(table)
                ids.write(groups.tokens_in_order().data)
                lengths.write(groups.lengths.astype(np.int32).data)
        write_checksums(unfinished)
        for name in _FILES:  # nothing writes to them any more: the machine may keep their digests at once
            os.utime(unfinished / name, (time.time(), time.time() - 60))
