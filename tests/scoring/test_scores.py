"""The prepared pairs are compared with their manifest before a stage reads them."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bdpo.data.pairs import PAIR_SCHEMA, pairs_digest
from bdpo.errors import UserError
from bdpo.scoring.scores import checked_pairs_digest
from bdpo.storage.manifests import write_manifest
from bdpo.storage.run_dir import RunDir


@pytest.fixture
def run(tmp_path):
    """A run folder with prepared pairs in two parts."""
    run = RunDir(tmp_path / "run")
    run.pairs.mkdir(parents=True)
    for number in range(2):
        table = pa.Table.from_pylist(pair_rows(number), schema=PAIR_SCHEMA)
        pq.write_table(table, run.pairs / f"part-{number:05d}.parquet")
    write_manifest(run.data / "manifest.json", {}, pairs_digest=pairs_digest(run.pairs))
    return run


def pair_rows(number):
    empty = dict.fromkeys(PAIR_SCHEMA.names)
    turn = {"role": "user", "content": "which?"}
    return [
        empty | {"pair_id": f"{number}-{i}", "prompt": [turn], "chosen": f"yes {i}", "rejected": f"no {i}"}
        for i in range(5)
    ]


def test_pairs_as_they_were_prepared(run):
    assert checked_pairs_digest(run) == pairs_digest(run.pairs)


def test_exchanged_responses_are_refused(run):
    part = run.pairs / "part-00001.parquet"
    names = ["rejected" if name == "chosen" else "chosen" if name == "rejected" else name
             for name in PAIR_SCHEMA.names]  # fmt: skip
    swapped = pq.read_table(part).rename_columns(names).select(PAIR_SCHEMA.names)
    pq.write_table(swapped, part)
    with pytest.raises(UserError, match=r"pairs: the pairs were changed or damaged after they were prepared"):
        checked_pairs_digest(run)


def test_a_lost_part_and_a_flipped_byte_are_refused(run):
    part = run.pairs / "part-00000.parquet"
    content = part.read_bytes()
    part.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with pytest.raises(UserError, match="changed or damaged"):
        checked_pairs_digest(run)
    part.unlink()
    with pytest.raises(UserError, match="changed or damaged"):
        checked_pairs_digest(run)


def test_without_prepared_pairs(tmp_path):
    with pytest.raises(UserError, match="no prepared pairs"):
        checked_pairs_digest(RunDir(tmp_path))
