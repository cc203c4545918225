"""Preparing preference pairs: check every row of a source, write the usable ones as Parquet.

Every row that is read ends as exactly one of kept, quarantined, excluded by its format's rule, or not
sampled, and the account says how many of each. Texts go to the pairs and to the private quarantine file
and nowhere else. Opening files is left to `bdpo.data.sources`, their formats to `bdpo.data.formats`.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import TemplateError

from bdpo.config import DataConfig
from bdpo.data.formats import FORMATS, BadRow, Excluded, Pair, detect
from bdpo.data.pairs import PAIR_SCHEMA
from bdpo.data.sources import NumberedRow, Row, Unreadable, read_rows
from bdpo.errors import UserError
from bdpo.models.tokenizer import ChatTokenizer, PromptTooLong, encode_pair
from bdpo.storage.digests import json_digest
from bdpo.storage.paths import StoragePath, atomic_folder, private_file

ROW_GROUP = 512

PART_ROWS = 8 * ROW_GROUP

DETECT_ROWS = 100


@dataclass(frozen=True)
class _Usable:
    """A pair that passed every check, and the number of its row."""

    row: int
    pair_id: str
    pair: Pair


@dataclass
class _Account:
    """What became of the rows of a source."""

    source: str
    format: str
    bad_rows: StoragePath
    rows: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    excluded: Counter[str] = field(default_factory=Counter)
    not_sampled: int = 0
    groups: Counter[str] = field(default_factory=Counter)

    def summary(self) -> dict[str, Any]:
        """The account as plain values, after the check that no row was lost."""
        kept = self.groups.total()
        ended = kept + self.quarantined.total() + self.excluded.total() + self.not_sampled
        if ended != self.rows:
            raise RuntimeError(f"{self.source}: {self.rows} rows were read, {ended} are accounted for")
        return {
            "source": self.source,
            "format": self.format,
            "rows": self.rows,
            "kept": kept,
            "quarantined": dict(self.quarantined),
            "excluded": dict(self.excluded),
            "not_sampled": self.not_sampled,
            "groups": dict(self.groups),
        }


def prepare(
    config: DataConfig,
    chat: ChatTokenizer,
    out: StoragePath,
    quarantine: StoragePath,
    seed: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, Any]:
    """Write the usable pairs of `data.path` into folder `out`, the bad rows into folder `quarantine`.

    `out` appears whole or not at all; an earlier one is replaced. `progress` is called with the number of
    rows just read. Returns the account: `source`, `format`, `rows`, `kept`, `quarantined` and
    `excluded` (reason -> rows), `not_sampled`, `groups` (`safe`, `unsafe` or `none` -> kept pairs).

    Raises:
        UserError: the source or its format cannot be read, more than `max_bad_fraction` of its rows are
            bad, none is usable, or it has fewer pairs than `data.sample` asks for.
    """
    rows = islice(read_rows(config), config.limit)
    head = list(islice(rows, DETECT_ROWS))
    sample_rows = [row for _, row in head if not isinstance(row, Unreadable)]
    if head and not sample_rows:
        number, first = head[0]
        reason = first.reason if isinstance(first, Unreadable) else ""
        raise UserError(f"data.path={config.path}: no row can be read (row {number}: {reason})")
    name = format_of(config, sample_rows)
    account = _Account(config.path, name, quarantine / "quarantine.jsonl")
    with atomic_folder(out) as unfinished:
        with private_file(account.bad_rows) as bad:
            pairs = _usable(chain(head, rows), _Checker(config, name, chat), account, bad, config, progress)
            if config.sample:
                pairs = _sample(pairs, config, seed, account)
            _write(pairs, unfinished, account)
        return account.summary()


def format_of(config: DataConfig, rows: Sequence[dict[str, Any]]) -> str:
    """The format that is configured, or else the one that these first rows have.

    Raises:
        UserError: they have none that is known.
    """
    return detect(rows, f"data.path={config.path}") if config.format == "auto" else config.format


class _Checker:
    """Raw row -> pair id and pair; remembers the ids that passed, to find duplicates."""

    def __init__(self, config: DataConfig, name: str, chat: ChatTokenizer) -> None:
        self.config = config
        self.format = FORMATS[name]
        self.chat = chat
        self.seen: set[str] = set()

    def __call__(self, row: Row | Unreadable) -> tuple[str, Pair]:
        if isinstance(row, Unreadable):
            raise BadRow(row.reason)
        pair = self.format(row)
        _check_texts(pair)
        pair_id = json_digest([pair["prompt"], pair["chosen"], pair["rejected"]])
        if pair_id in self.seen:
            raise BadRow("duplicate")
        self._check_tokens(pair)
        self.seen.add(pair_id)
        return pair_id, pair

    def _check_tokens(self, pair: Pair) -> None:
        try:
            encoded = encode_pair(self.chat, pair, self.config.max_prompt_length, self.config.max_length)
        except PromptTooLong:
            raise BadRow("prompt: longer than max_prompt_length") from None
        except TemplateError:
            raise BadRow("prompt: refused by the chat template") from None
        if encoded.chosen == encoded.rejected:
            raise BadRow("chosen equals rejected within max_length")


def _check_texts(pair: Pair) -> None:
    if not any(m["role"] == "user" and m["content"].strip() for m in pair["prompt"]):
        raise BadRow("prompt: no user turn with text")
    if pair["prompt"][-1]["role"] != "user":
        raise BadRow("prompt: does not end with a user turn")
    if not pair["chosen"].strip():
        raise BadRow("chosen: empty")
    if not pair["rejected"].strip():
        raise BadRow("rejected: empty")
    if pair["chosen"] == pair["rejected"]:
        raise BadRow("chosen equals rejected")


def _usable(
    rows: Iterable[NumberedRow],
    check: _Checker,
    account: _Account,
    bad: IO[str],
    config: DataConfig,
    progress: Callable[[int], None],
) -> Iterator[_Usable]:
    """The rows that pass; the others are accounted for and, if bad, written to `bad`."""
    first_bad = 0
    for number, row in rows:
        account.rows += 1
        progress(1)
        try:
            usable = _Usable(number, *check(row))
        except BadRow as error:
            first_bad = first_bad or number
            account.quarantined[str(error)] += 1
            raw = row.raw if isinstance(row, Unreadable) else row
            bad.write(json.dumps({"row": number, "reason": str(error), "raw": raw}, default=str) + "\n")
        except Excluded as error:
            account.excluded[str(error)] += 1
        else:
            yield usable
    if account.quarantined.total() > config.max_bad_fraction * account.rows:
        reasons = "; ".join(f"{reason} ×{count}" for reason, count in account.quarantined.most_common())
        raise UserError(
            f"data.path={config.path}: {account.quarantined.total()} of {account.rows} rows are bad, more "
            f"than data.max_bad_fraction={config.max_bad_fraction} ({reasons}); "
            f"the first is row {first_bad}, all are in {account.bad_rows}"
        )


def _sample(pairs: Iterable[_Usable], config: DataConfig, seed: int, account: _Account) -> Iterator[_Usable]:
    """Of each group the pairs whose keyed hash is lowest: a draw without replacement, in any row order."""
    wanted = config.sample or {}
    drawn: dict[str, list[tuple[int, int, _Usable]]] = {"safe": [], "unsafe": []}
    found: Counter[str] = Counter()
    for usable in pairs:
        group = usable.pair["group"]
        if group is None:
            raise UserError(f"data.sample: row {usable.row} of data.path={config.path} has no group")
        found[group] += 1
        rank = hashlib.sha256(f"{seed} {usable.pair_id}".encode()).digest()
        heapq.heappush(drawn[group], (-int.from_bytes(rank), usable.row, usable))
        if len(drawn[group]) > wanted.get(group, 0):
            heapq.heappop(drawn[group])
            account.not_sampled += 1
    for group, count in wanted.items():
        if found[group] < count:
            raise UserError(
                f"data.sample.{group}={count}: data.path={config.path} has only {found[group]} such pairs "
                f"(safe {found['safe']}, unsafe {found['unsafe']})"
            )
    kept = (usable for heap in drawn.values() for _, _, usable in heap)
    yield from sorted(kept, key=lambda usable: usable.row)


def _write(pairs: Iterator[_Usable], folder: Path, account: _Account) -> None:
    number = 0
    while batch := list(islice(pairs, PART_ROWS)):
        account.groups.update(usable.pair["group"] or "none" for usable in batch)
        table = pa.Table.from_pylist(
            [{"pair_id": usable.pair_id, **usable.pair} for usable in batch], schema=PAIR_SCHEMA
        )
        with (folder / f"part-{number:05d}.parquet").open("wb") as file:
            pq.write_table(table, file, row_group_size=ROW_GROUP)
            os.fsync(file.fileno())
        number += 1
    if not number:
        raise UserError(
            f"data.path={account.source}: none of {account.rows} rows is usable "
            f"({account.quarantined.total()} bad, {account.excluded.total()} excluded by its format)"
        )
