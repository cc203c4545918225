"""Preparing preference pairs: check every row of the data sets, write the usable ones as Parquet.

Every row that is read ends as exactly one of kept, quarantined, excluded by its format's rule, or not
sampled, and the account has the number of each. Texts are written to the pairs and to the private quarantine
file and nowhere else.
"""

from __future__ import annotations

import gc
import hashlib
import heapq
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow.parquet as pq

from bdpo.config import DataConfig
from bdpo.config.data import SourceConfig
from bdpo.data.account import Account, SourceAccount
from bdpo.data.checks import check_pair
from bdpo.data.containers import NumberedRow, RawRow, Unreadable, shown_name
from bdpo.data.formats import columns_of, read_pair
from bdpo.data.formats.base import BadRow, Excluded, Format, LeftOut, Pair
from bdpo.data.pairs import PairIds, context_of, plain_turns, table_of
from bdpo.data.rendering import Rendered, encode_pairs
from bdpo.data.sources import DETECT_ROWS, Source, open_source
from bdpo.errors import UserError, escaped
from bdpo.models.tokenizer import ChatTokenizer, EncodedPair
from bdpo.storage.digests import json_digest
from bdpo.storage.paths import StoragePath, atomic_folder, private_file

ROW_GROUP = 512

PART_ROWS = 8 * ROW_GROUP

BATCH_ROWS = 256  # rows that are rendered and tokenised at a time


@dataclass(frozen=True)
class _Usable:
    """A pair that passed every check, its token ids, and where it stands: the number of its row."""

    source: Source
    account: SourceAccount
    row: int
    pair_id: str
    pair: Pair
    ids: PairIds
    changed: bool  # whether the chat template writes other texts than those of its messages


def prepare(
    config: DataConfig,
    chat: ChatTokenizer,
    out: StoragePath,
    quarantine: StoragePath,
    seed: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> Account:
    """Write the usable pairs of `data.path` into folder `out`, the bad rows into folder `quarantine`.

    `out` appears complete or not at all; an earlier one is replaced. `progress` is called with the number
    of rows just read.

    Raises:
        UserError: a source or its format cannot be read, more than `max_bad_fraction` of its rows are
            bad, none is usable, or there are fewer pairs than `data.sample` asks for.
    """
    account = Account()
    with atomic_folder(out) as unfinished, _rare_collections():
        bad_rows = quarantine / "quarantine.jsonl"
        with private_file(bad_rows) as bad:
            pairs = _all_usable(config, _Examiner(config, chat, seed), account, bad, progress, bad_rows)
            if config.sample:
                pairs = _sample(pairs, config, seed)
            _write(pairs, unfinished, account, config)
        account.check()
        return account


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Garbage is collected after 100,000 new objects; after Python's 700 it takes a tenth of the time."""
    thresholds = gc.get_threshold()
    gc.set_threshold(100_000, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def usable_pair(form: Format, row: RawRow | Unreadable, source: SourceConfig) -> Pair:
    """The pair of a row, before it is rendered.

    Raises:
        BadRow: the row cannot be used.
        Excluded: its format leaves it out.
    """
    if isinstance(row, Unreadable):
        raise BadRow(row.reason)
    pair = read_pair(form, row)
    labels = {name: value for name, value in source.labels.model_dump().items() if value is not None}
    missing = {name: value for name, value in labels.items() if getattr(pair, name) is None}
    pair = replace(pair, **missing) if missing else pair
    check_pair(pair)
    return pair


def first_pairs(
    config: DataConfig, chat: ChatTokenizer, count: int
) -> tuple[list[tuple[Pair, EncodedPair]], list[str]]:
    """The first usable pairs of every source with their token ids, at most `count` each; why others are not.

    Raises:
        UserError: a source or its format cannot be read.
    """
    found: list[tuple[Pair, EncodedPair]] = []
    reasons = []
    for source_config in config.sources():
        source = open_source(source_config)
        examine = _Examiner(config, chat, seed=0)
        read = (examine.read(source, row) for _, row in islice(source.rows, DETECT_ROWS))
        pairs = []
        for pair in read:
            if isinstance(pair, Pair):
                pairs.append(pair)
            else:
                reasons.append(str(pair))
            if len(pairs) == count:
                break
        for pair, encoded in zip(pairs, encode_pairs(chat, pairs, config), strict=True):
            if isinstance(encoded, BadRow):
                reasons.append(str(encoded))
            else:
                found.append((pair, encoded[0]))
    return found, reasons


class _Examiner:
    """Batches of raw rows -> usable pairs; remembers the pairs that passed, to find duplicates."""

    def __init__(self, config: DataConfig, chat: ChatTokenizer, seed: int) -> None:
        self.config = config
        self.chat = chat
        self.seed = seed
        # Which data set has the pair (the id of its account), and its labels. Of tuples of numbers and texts
        # the garbage collector keeps no record, so millions of them do not slow it down.
        self.seen: dict[bytes, tuple[int, str | None, bool | None, bool | None]] = {}

    def __call__(
        self, source: Source, account: SourceAccount, rows: list[NumberedRow]
    ) -> Iterator[tuple[NumberedRow, _Usable | BadRow | Excluded | None]]:
        """Each row and what it is: None if it is sound but the source's weight leaves it out."""
        read = [self.read(source, row) for _, row in rows]
        pairs = [pair for pair in read if isinstance(pair, Pair)]
        encoded = iter(encode_pairs(self.chat, pairs, self.config))
        for numbered, pair in zip(rows, read, strict=True):
            if isinstance(pair, Pair):
                yield numbered, self._examine(source, account, numbered[0], pair, next(encoded))
            else:
                yield numbered, pair

    def read(self, source: Source, row: RawRow | Unreadable) -> Pair | BadRow | Excluded:
        """The pair of a row before it is rendered, or why there is none."""
        try:
            return usable_pair(source.format, row, source.config)
        except (BadRow, Excluded) as reason:
            return reason

    def _examine(
        self,
        source: Source,
        account: SourceAccount,
        row: int,
        pair: Pair,
        encoded: tuple[EncodedPair, Rendered] | BadRow,
    ) -> _Usable | BadRow | None:
        if isinstance(encoded, BadRow):
            return encoded
        ids, rendered = encoded
        pair_id = id_of(rendered.written)
        labels = (pair.group, pair.chosen_safe, pair.rejected_safe)
        if (first := self.seen.get(key := bytes.fromhex(pair_id)[:16])) is not None:
            other = "" if first[1:] == labels else ", with other labels"  # those of the first row are kept
            if first[0] == id(account):
                return BadRow(f"duplicate{other}")
            return LeftOut(f"duplicate of a pair of another data set{other}")
        account.unread |= rendered.unwritten | {shown_name(name) for name in pair.unread}
        if source.config.weight < 1 and _draw(self.seed, pair_id) >= source.config.weight * 2**256:
            return None  # another data set may keep it
        self.seen[key] = id(account), *labels
        arrays = (np.fromiter(part, np.int32, len(part)) for part in (ids.prompt, ids.chosen, ids.rejected))
        return _Usable(source, account, row, pair_id, pair, tuple(arrays), rendered.changed)  # type: ignore[arg-type]


def id_of(pair: Pair) -> str:
    """The digest of what distinguishes a pair from others: all its texts and arguments, not its labels.

    Message keys that the chat template does not write make no difference, so it is given the pair without
    them (`Rendered.written`).
    """
    texts = [plain_turns(pair.prompt), pair.chosen["content"], pair.rejected["content"]]
    context = context_of(pair)
    return json_digest([*texts, context] if context else texts)


def _all_usable(
    config: DataConfig,
    examine: _Examiner,
    account: Account,
    bad: IO[str],
    progress: Callable[[int], None],
    bad_rows: StoragePath,
) -> Iterator[_Usable]:
    """The rows of all sources that pass; the others are accounted for and, if bad, written to `bad`."""
    sources = config.sources()
    for source_config in sources:
        source = open_source(source_config)
        of_source = SourceAccount(source_config.path, source.format.name)
        account.sources.append(of_source)
        note = {"source": source_config.path} if len(sources) > 1 else {}
        yield from _usable(source, of_source, examine, bad, note, progress)
        _refuse_mostly_bad(config, of_source, bad_rows)


def _usable(
    source: Source,
    account: SourceAccount,
    examine: _Examiner,
    bad: IO[str],
    note: dict[str, str],
    progress: Callable[[int], None],
) -> Iterator[_Usable]:
    known = columns_of(source.format)
    while batch := list(islice(source.rows, BATCH_ROWS)):
        for (number, row), outcome in examine(source, account, batch):
            account.rows += 1
            if not isinstance(row, Unreadable) and not row.keys() <= known:
                account.unread |= {shown_name(name) for name in row.keys() - known}
            if isinstance(outcome, BadRow):
                account.quarantined[str(outcome)] += 1
                if isinstance(outcome, LeftOut):
                    account.left_out[str(outcome)] += 1
                else:
                    account.first_damaged = account.first_damaged or source.reader.place(number)
                raw = row.raw if isinstance(row, Unreadable) else row
                file, number = source.reader.locate(number)
                place = {"file": file, "row": number} if file else {"row": number}
                line = {**note, **place, "reason": str(outcome), "raw": raw}
                bad.write(json.dumps(line, default=str) + "\n")
            elif isinstance(outcome, Excluded):
                account.excluded[str(outcome)] += 1
            elif outcome is None:
                account.not_sampled += 1
            else:
                yield outcome
        progress(len(batch))
    account.unread |= {shown_name(name) for name in source.reader.declared if name not in known}
    account.unread |= {f"{shown_name(name)} (beside the rows)" for name in source.reader.beside_rows}
    account.unread_files |= set(source.reader.unread_files)


def _refuse_mostly_bad(config: DataConfig, account: SourceAccount, bad_rows: StoragePath) -> None:
    """Raise a UserError if more than `data.max_bad_fraction` of the rows of a source are damaged."""
    if (count := account.damaged.total()) > config.max_bad_fraction * account.rows:
        raise UserError(
            f"data.path={escaped(account.source)}: {count} of {account.rows} rows read as {account.format} "
            f"are bad, more than data.max_bad_fraction={config.max_bad_fraction} "
            f"({reasons_text(account.damaged)}); the first is {account.first_damaged}, all are in {bad_rows}"
        )


def reasons_text(counts: Counter[str]) -> str:
    """`column chosen: null ×12; no prompt ×3`, the most frequent first."""
    return "; ".join(f"{reason} ×{count}" for reason, count in counts.most_common())


def _draw(seed: int, pair_id: str) -> int:
    """A number below 2^256 that depends on seed and pair alone: the same draw in any order of rows."""
    return int.from_bytes(hashlib.sha256(f"{seed} {pair_id}".encode()).digest())


def _sample(pairs: Iterable[_Usable], config: DataConfig, seed: int) -> Iterator[_Usable]:
    """The pairs of each group whose keyed hash is lowest: a draw without replacement, in any row order."""
    asked = config.sample or {}
    drawn: dict[str, list[tuple[int, int, _Usable]]] = {"safe": [], "unsafe": []}
    found: Counter[str] = Counter()
    for number, usable in enumerate(pairs):
        group = usable.pair.group
        if group is None:
            raise UserError(
                f"data.sample: {usable.source.reader.place(usable.row)} of "
                f"data.path={escaped(usable.account.source)} has no group"
            )
        found[group] += 1
        heapq.heappush(drawn[group], (-_draw(seed, usable.pair_id), number, usable))
        if len(drawn[group]) > asked.get(group, 0):
            heapq.heappop(drawn[group])[2].account.not_sampled += 1
    for group, count in asked.items():
        if found[group] < count:
            raise UserError(
                f"data.sample.{group}={count}: data.path={config.names} has only {found[group]} such pairs "
                f"(safe {found['safe']}, unsafe {found['unsafe']})"
            )
    kept = ((number, usable) for heap in drawn.values() for _, number, usable in heap)
    yield from (usable for _, usable in sorted(kept, key=lambda numbered: numbered[0]))


def _write(pairs: Iterator[_Usable], folder: Path, account: Account, config: DataConfig) -> None:
    part = 0
    while batch := list(islice(pairs, PART_ROWS)):
        for usable in batch:
            usable.account.kept += 1
            usable.account.changed_by_template += usable.changed
            account.groups[usable.pair.group or "none"] += 1
        with (folder / f"part-{part:05d}.parquet").open("wb") as file:
            pairs_table = table_of((one.pair_id, one.pair, one.ids) for one in batch)
            pq.write_table(pairs_table, file, row_group_size=ROW_GROUP)
            os.fsync(file.fileno())
        part += 1
    if not part:
        fates = account.quarantined + account.excluded + Counter({"not sampled": account.not_sampled})
        raise UserError(
            f"data.path={config.names}: none of {account.rows} rows is usable ({reasons_text(fates)})"
        )
