"""The account of the rows: each that is read is kept, quarantined, excluded or not sampled, with a reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from bdpo.storage.records import PreparedRows, SourceRows, account_notes


@dataclass
class SourceAccount:
    """What happened to the rows of one data set; `unread` are columns and message keys without effect.

    `changed_by_template` counts kept rows with a text that the chat template cuts or rewrites; the spaces
    that it trims at both ends do not count. `left_out` are the quarantined rows that are not damaged.
    """

    source: str
    format: str
    rows: int = 0
    kept: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    excluded: Counter[str] = field(default_factory=Counter)
    not_sampled: int = 0
    first_damaged: str = ""  # where it stands
    unread: set[str] = field(default_factory=set)
    unread_files: set[str] = field(default_factory=set)
    changed_by_template: int = 0

    @property
    def damaged(self) -> Counter[str]:
        """Reason -> bad rows, without those that only a setting or another data set leaves out."""
        return self.quarantined - self.left_out

    def check(self) -> None:
        """Raise a RuntimeError if a row was lost: a mistake of this program."""
        ended = self.kept + self.quarantined.total() + self.excluded.total() + self.not_sampled
        if ended != self.rows:
            raise RuntimeError(f"{self.source}: {self.rows} rows were read, {ended} are accounted for")

    def to_json(self) -> SourceRows:
        """The account as plain values."""
        return {
            "source": self.source,
            "format": self.format,
            "rows": self.rows,
            "kept": self.kept,
            "quarantined": dict(self.quarantined),
            "excluded": dict(self.excluded),
            "not_sampled": self.not_sampled,
            "unread_columns": sorted(self.unread),
            "unread_files": sorted(self.unread_files),
            "changed_by_template": self.changed_by_template,
        }


@dataclass
class Account:
    """What happened to the rows of all data sets, and the groups of the kept pairs."""

    sources: list[SourceAccount] = field(default_factory=list)
    groups: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        """How many rows were read."""
        return sum(source.rows for source in self.sources)

    @property
    def kept(self) -> int:
        """How many pairs were written."""
        return sum(source.kept for source in self.sources)

    @property
    def quarantined(self) -> Counter[str]:
        """Reason -> bad rows."""
        return sum((source.quarantined for source in self.sources), Counter[str]())

    @property
    def excluded(self) -> Counter[str]:
        """Reason -> rows that the rule of a format leaves out."""
        return sum((source.excluded for source in self.sources), Counter[str]())

    @property
    def not_sampled(self) -> int:
        """How many sound pairs were not drawn."""
        return sum(source.not_sampled for source in self.sources)

    def check(self) -> None:
        """Raise a RuntimeError if a row was lost."""
        for source in self.sources:
            source.check()

    def to_json(self) -> PreparedRows:
        """The account as plain values."""
        parts = [source.to_json() for source in self.sources]
        total: PreparedRows = {
            "source": ", ".join(part["source"] for part in parts),
            "format": ", ".join(dict.fromkeys(part["format"] for part in parts)),
            "rows": self.rows,
            "kept": self.kept,
            "quarantined": dict(self.quarantined),
            "excluded": dict(self.excluded),
            "not_sampled": self.not_sampled,
            "unread_columns": sorted({name for part in parts for name in part["unread_columns"]}),
            "unread_files": sorted({name for part in parts for name in part["unread_files"]}),
            "changed_by_template": sum(part["changed_by_template"] for part in parts),
            "groups": dict(self.groups),
        }
        if len(parts) > 1:
            total["sources"] = parts
        return total


def account_line(account: PreparedRows) -> str:
    """One line that accounts for every row: read = kept + quarantined + excluded + not sampled."""
    parts = [f"{account['rows']} rows read ({account['format']}) = {account['kept']} kept"]
    for fate, counts in (("quarantined", account["quarantined"]), ("excluded", account["excluded"])):
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        parts.append(f"{sum(counts.values())} {fate}" + (f" ({reasons})" if reasons else ""))
    if account["not_sampled"]:
        parts.append(f"{account['not_sampled']} not sampled")
    return "; ".join([" + ".join(parts), *account_notes(account)])
