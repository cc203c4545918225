"""The token ids of all prepared pairs in one array, which the processes of a machine map into their memory.

Training reads pairs in random order, in every epoch and every trial. From Parquet each worker would decode
all of them into memory of its own; the pages of a mapped file are read when they are used, and shared.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bdpo.data.pairs import ID_COLUMNS, pair_tables, prefix_groups
from bdpo.errors import UserError, error_line
from bdpo.storage.cache import cache_folder, machine_lock
from bdpo.storage.digests import cached_sha256
from bdpo.storage.manifests import read_facts
from bdpo.storage.paths import StoragePath
from bdpo.storage.run_dir import RunDir

if TYPE_CHECKING:
    from bdpo.models.packing import PrefixGroups

KEPT = 4
"""A machine keeps the ids of so many sets of pairs, the newest ones."""


def mapped_groups(run: RunDir) -> PrefixGroups:
    """`[c(x) | y_w | y_l]` of all prepared pairs of a run, in order.

    The first process of a machine copies the ids into a file of the machine's cache: int32 of all ids, then
    of all lengths. Its name holds the digest of the pairs in their manifest, the number of pairs, and a
    digest of its content, which is checked.

    Raises:
        UserError: the ids cannot be read, or the cache not be written.
    """
    from bdpo.models.packing import PrefixGroups

    digest, copies = read_facts(run.data / "manifest.json")["pairs_digest"], cache_folder() / "tokens"
    try:
        copies.mkdir(parents=True, exist_ok=True, mode=0o700)  # ids are texts
        with machine_lock(copies / "lock"):
            file = _intact_copy(copies, digest) or _new_copy(copies, digest, run.pairs)
            values = np.asarray(np.memmap(file, np.int32, mode="r"))
    except OSError as error:
        raise UserError(
            f"{run.pairs}: the token ids cannot be copied to {copies} (BDPO_CACHE): {error_line(error)}"
        ) from None
    pairs = int(file.stem.split("-")[1])
    ids, lengths = np.split(values, [len(values) - 3 * pairs])
    return PrefixGroups.in_a_row(ids, lengths.reshape(pairs, 3))


def _intact_copy(copies: Path, digest: str) -> Path | None:
    """The copy of these pairs if its content is what was written; a damaged one is removed."""
    for file in copies.glob(f"{digest}-*.i32"):
        if cached_sha256(file) == file.stem.split("-")[2]:
            return file
        file.unlink()
    return None


def _new_copy(copies: Path, digest: str, folder: StoragePath) -> Path:
    """The copy of these pairs, complete or not at all; the oldest other ones and leftovers are removed."""
    kept = sorted(copies.glob("*.i32"), key=lambda file: file.stat().st_mtime)
    for old in [*kept[: 1 - KEPT], *copies.glob(".*")]:
        old.unlink(missing_ok=True)  # a process that has mapped it keeps it until it ends
    content, lengths = hashlib.sha256(), []
    with tempfile.NamedTemporaryFile(prefix=".", dir=copies, delete=False) as unfinished:

        def write(values: np.ndarray) -> None:
            unfinished.write(values.data)
            content.update(values.data)

        for table in pair_tables(folder, ID_COLUMNS):
            groups = prefix_groups(table)
            write(groups.tokens_in_order())
            lengths.append(groups.lengths.astype(np.int32))
        for of_part in lengths:
            write(of_part)
        unfinished.flush()
        os.fsync(unfinished.fileno())
    copy = copies / f"{digest}-{sum(map(len, lengths))}-{content.hexdigest()}.i32"
    # Nothing writes to it any more: `cached_sha256` may keep its digest at once, for all workers.
    os.utime(unfinished.name, (time.time(), time.time() - 60))
    return Path(unfinished.name).rename(copy)
