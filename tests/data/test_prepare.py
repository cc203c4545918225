"""Rows -> prepared pairs: validation, quarantine, sampling, and every row accounted for."""

from __future__ import annotations

import random
import stat
from collections import Counter

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bdpo.config import DataConfig
from bdpo.data.pairs import PAIR_SCHEMA, PairReader, count_pairs, read_pairs
from bdpo.data.prepare import ROW_GROUP, prepare
from tests.support.chats import CHATML
from tests.support.data_files import pair_row, refusal, write_jsonl


class TestValidation:
    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"prompt": "  "}, "prompt: no user turn with text"),
            ({"prompt": []}, "prompt: no user turn with text"),
            ({"prompt": [{"role": "system", "content": "x"}]}, "prompt: no user turn with text"),
            (
                {"prompt": [{"role": r, "content": "x"} for r in ("user", "assistant")]},
                "prompt: does not end with a user turn",
            ),
            ({"chosen": " \n\t"}, "chosen: empty"),
            ({"rejected": ""}, "rejected: empty"),
            ({"rejected": None}, "rejected: null"),
            ({"rejected": 12}, "rejected: wrong type"),
            ({"rejected": "no 1"}, "chosen equals rejected"),
            ({"chosen": "\udc80"}, "chosen: not UTF-8"),
        ],
    )
    def test_bad_texts(self, prepare_here, quarantined_rows, changes, reason):
        bad = pair_row(1, **changes)
        account = prepare_here([pair_row(0), bad, pair_row(2)])
        assert (account.rows, account.kept, account.quarantined) == (3, 2, {reason: 1})
        assert quarantined_rows() == [{"row": 2, "reason": reason, "raw": bad}]

    def test_lengths(self, prepare_here, tiny_chat):
        """One token a byte: a prompt of one byte more than fits, and responses that part too late."""
        frame = len(tiny_chat.prompt_ids([{"role": "user", "content": ""}]))
        rows = [
            {"prompt": "p" * 10, "chosen": "same A", "rejected": "same B"},
            {"prompt": "p" * 11, "chosen": "same A", "rejected": "same B"},
            {"prompt": "p" * 10, "chosen": "same? A", "rejected": "same? B"},
        ]
        account = prepare_here(rows, max_prompt_length=frame + 10, max_length=frame + 16)
        assert account.kept == 1
        assert account.quarantined == {
            "prompt: longer than max_prompt_length": 1,
            "chosen equals rejected within max_length": 1,
        }

    def test_rows_that_are_too_long_are_not_damaged(self, prepare_here, quarantined_rows):
        """They are quarantined, but no number of them stops a run unless nothing is left."""
        rows = [pair_row(0), *(pair_row(i, prompt="p" * 90 + str(i)) for i in range(1, 5))]
        lengths = {"max_prompt_length": 60, "max_length": 100, "max_bad_fraction": 0.1}
        account = prepare_here(rows, **lengths)
        assert (account.kept, account.quarantined) == (1, {"prompt: longer than max_prompt_length": 4})
        assert [row["row"] for row in quarantined_rows()] == [2, 3, 4, 5]
        said = refusal(prepare_here, [*rows, pair_row(9, chosen="")], **lengths)
        assert "1 of 6 rows read as preference are bad" in said
        assert "(chosen: empty ×1); the first is row 6" in said
        assert refusal(prepare_here, rows[1:], **lengths).endswith(
            "none of 4 rows is usable (prompt: longer than max_prompt_length ×4)"
        )

    def test_duplicates(self, prepare_here, kept_pairs):
        other_form = {
            "prompt": [{"content": pair_row(0)["prompt"], "role": "user"}],
            "chosen": pair_row(0)["chosen"],
            "rejected": [{"role": "assistant", "content": pair_row(0)["rejected"]}],
        }
        swapped = pair_row(0, chosen="yes 0", rejected="no 0")
        account = prepare_here([pair_row(0), pair_row(0), other_form, swapped])
        assert (account.kept, account.quarantined) == (2, {"duplicate": 2})
        assert len({pair["pair_id"] for pair in kept_pairs()}) == 2

    def test_a_prompt_that_the_template_refuses(self, tmp_path, make_chat):
        refuses_system = (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
        )
        system = [{"role": role, "content": "x"} for role in ("system", "user")]
        file = write_jsonl(tmp_path / "rows.jsonl", [pair_row(0), pair_row(1, prompt=system)])
        config = DataConfig(path=str(file), max_bad_fraction=0.5)
        account = prepare(config, make_chat(refuses_system), tmp_path / "pairs", tmp_path / "private", 0)
        assert account.quarantined == {"prompt: refused by the chat template": 1}

    def test_pku_accounts_for_the_pairs_that_its_rule_leaves_out(self, prepare_here):
        def row(i, safe_0, safe_1):
            labels = {"is_response_0_safe": safe_0, "is_response_1_safe": safe_1, "better_response_id": 0}
            return {"prompt": f"q{i}", "response_0": "zero", "response_1": "one", **labels}

        labels = [(True, True), (True, False), (False, True), (False, False), (False, False), (None, True)]
        account = prepare_here([row(i, *safe) for i, safe in enumerate(labels)])
        assert account.groups == {"safe": 1, "unsafe": 2}
        assert account.excluded == {"both responses unsafe": 2}
        assert account.quarantined == {"is_response_0_safe: null": 1}

    def test_too_many_bad_rows_stop_the_run(self, tmp_path, prepare_here, quarantined_rows):
        rows = [pair_row(i) for i in range(8)] + [pair_row(8, chosen=None), pair_row(9, chosen="")]
        said = refusal(prepare_here, rows, max_bad_fraction=0.19)
        assert "2 of 10 rows read as preference are bad" in said
        assert "chosen: null ×1; chosen: empty ×1" in said
        assert "the first is row 9" in said
        assert str(tmp_path / "private" / "quarantine.jsonl") in said
        assert [row["row"] for row in quarantined_rows()] == [9, 10]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["private", "rows.jsonl"]
        assert prepare_here(rows, max_bad_fraction=0.2).kept == 8

    def test_no_pair_left(self, tmp_path, prepare_here):
        said = refusal(prepare_here, [pair_row(0, chosen=""), pair_row(1, chosen="")])
        assert said.endswith("none of 2 rows is usable (chosen: empty ×2)")
        assert not (tmp_path / "pairs").exists()

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    def test_every_row_is_accounted_for(self, prepare_here, kept_pairs, quarantined_rows, data):
        """Whatever is done to whichever rows: each is a pair or is in the quarantine file, never both."""
        junk = st.one_of(
            st.none(), st.booleans(), st.integers(), st.text(), st.lists(st.text(), max_size=2),
            st.dictionaries(st.sampled_from(["role", "content"]), st.text(), max_size=2),
        )  # fmt: skip
        rows = [pair_row(i, group=None) for i in range(data.draw(st.integers(1, 8)))]
        for row in rows:
            for column in data.draw(st.lists(st.sampled_from(sorted(row)), max_size=2, unique=True)):
                row[column] = data.draw(junk)
        lines = [*rows, *data.draw(st.lists(st.binary(min_size=1).filter(lambda b: b.strip()), max_size=3))]
        lines = [line.replace(b"\n", b"?") if isinstance(line, bytes) else line for line in lines]
        account = prepare_here([*lines, pair_row("sound")], format="preference")
        bad = quarantined_rows()
        assert account.rows == len(lines) + 1 == account.kept + len(bad)
        assert account.quarantined == Counter(row["reason"] for row in bad)
        assert account.kept == len(kept_pairs()) == len({pair["pair_id"] for pair in kept_pairs()})
        assert len({row["row"] for row in bad}) == len(bad)


class TestSample:
    rows = tuple(pair_row(i, group="unsafe" if i % 3 else "safe") for i in range(90))

    def drawn(self, prepare_here, kept_pairs, rows, seed=0, safe=7, unsafe=11):
        account = prepare_here(list(rows), seed=seed, sample={"safe": safe, "unsafe": unsafe})
        assert account.groups == {"safe": safe, "unsafe": unsafe}
        assert account.not_sampled == len(rows) - safe - unsafe
        return {pair["pair_id"] for pair in kept_pairs()}

    def test_depends_on_the_seed_and_not_on_the_order(self, prepare_here, kept_pairs):
        first = self.drawn(prepare_here, kept_pairs, self.rows)
        assert len(first) == 18
        assert self.drawn(prepare_here, kept_pairs, random.Random(1).sample(self.rows, 90)) == first
        assert self.drawn(prepare_here, kept_pairs, self.rows, seed=1) != first

    def test_pairs_stay_in_the_order_of_the_rows(self, prepare_here, kept_pairs):
        self.drawn(prepare_here, kept_pairs, self.rows)
        row_of = {row["prompt"]: number for number, row in enumerate(self.rows)}
        rows = [row_of[pair["prompt"][-1]["content"]] for pair in kept_pairs()]
        assert rows == sorted(rows)

    def test_a_group_that_is_not_asked_for_is_left_out(self, prepare_here):
        account = prepare_here(list(self.rows), sample={"unsafe": 4})
        assert (account.groups, account.not_sampled) == ({"unsafe": 4}, 86)

    def test_all_of_a_group(self, prepare_here, kept_pairs):
        assert len(self.drawn(prepare_here, kept_pairs, self.rows, safe=30, unsafe=60)) == 90

    def test_every_pair_is_as_likely(self, prepare_here, kept_pairs):
        """Over 60 seeds each of 30 safe pairs is drawn 20 times on average, σ = 3.7; ±5σ."""
        rows = [row for row in self.rows if row["group"] == "safe"]
        counts = Counter()
        for seed in range(60):
            prepare_here(rows, seed=seed, sample={"safe": 10})
            counts.update(pair["pair_id"] for pair in kept_pairs())
        assert len(counts) == 30
        assert all(2 <= count <= 38 for count in counts.values())

    def test_more_than_there_are(self, tmp_path, prepare_here):
        said = refusal(prepare_here, list(self.rows), sample={"safe": 31})
        assert "data.sample.safe=31" in said
        assert "only 30 such pairs (safe 30, unsafe 60)" in said
        assert not (tmp_path / "pairs").exists()

    def test_pairs_without_group(self, prepare_here):
        assert "row 1 of" in refusal(prepare_here, [pair_row(0)], sample={"safe": 1})


class TestOutput:
    def test_schema_and_row_groups(self, tmp_path, prepare_here):
        rows = [pair_row(i) for i in range(ROW_GROUP * 9 + 5)]
        prepare_here(rows)
        parts = sorted((tmp_path / "pairs").iterdir())
        assert len(parts) == 2
        for part in parts:
            file = pq.ParquetFile(part)
            assert file.schema_arrow.equals(PAIR_SCHEMA)
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            assert max(groups) <= ROW_GROUP
        assert count_pairs(tmp_path / "pairs") == len(rows)

        edge = ROW_GROUP * 8
        for first, count in [(0, 1), (ROW_GROUP - 1, 2), (edge - 3, 7), (0, len(rows)), (len(rows) - 1, 9)]:
            table = read_pairs(tmp_path / "pairs", first, count)
            expected = [row["chosen"] for row in rows[first : first + count]]
            assert table.column("chosen").to_pylist() == expected
        assert read_pairs(tmp_path / "pairs", len(rows), 5).num_rows == 0
        reader, second = PairReader(tmp_path / "pairs"), parts[1].read_bytes()
        parts[1].write_bytes(b"")
        assert reader.read(edge - 3, 3).num_rows == 3  # the part after them is not opened
        parts[1].write_bytes(second)
        parts[0].write_bytes(b"")
        table = reader.read(edge, len(rows))  # nor is the part before them, now that its rows are counted
        assert table.column("chosen").to_pylist() == [row["chosen"] for row in rows[edge:]]

    def test_pair_id_is_of_the_content_alone(self, prepare_here, kept_pairs):
        prepare_here([pair_row(0), pair_row(1)])
        before = [pair["pair_id"] for pair in kept_pairs()]
        prepare_here([pair_row(1, group="safe"), pair_row(0, chosen_safe=True)])
        assert [pair["pair_id"] for pair in kept_pairs()] == before[::-1]

    def test_limit(self, prepare_here, kept_pairs):
        assert prepare_here([pair_row(i) for i in range(150)], limit=120).rows == 120
        assert len(kept_pairs()) == 120

    def test_progress_counts_rows(self, tmp_path, tiny_chat):
        file = write_jsonl(tmp_path / "rows.jsonl", [pair_row(i) for i in range(5)])
        seen = []
        config = DataConfig(path=str(file))
        prepare(config, tiny_chat, tmp_path / "pairs", tmp_path / "private", 0, seen.append)
        assert sum(seen) == 5

    def test_quarantine_is_private_and_of_this_run_alone(self, tmp_path, prepare_here, quarantined_rows):
        private = tmp_path / "private"
        private.mkdir(mode=0o755)
        (private / "quarantine.jsonl").write_text("stale\n")
        prepare_here([pair_row(0), pair_row(1, chosen=None)])
        assert len(quarantined_rows()) == 1
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
        assert stat.S_IMODE((private / "quarantine.jsonl").stat().st_mode) == 0o600

    def test_an_interrupted_run_leaves_no_pairs(self, tmp_path, tiny_chat):
        file = write_jsonl(tmp_path / "rows.jsonl", [pair_row(i) for i in range(ROW_GROUP * 9)])

        read = []

        def interrupt(rows):
            read.append(rows)
            if sum(read) > ROW_GROUP * 8:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prepare(
                DataConfig(path=str(file)), tiny_chat, tmp_path / "pairs", tmp_path / "private", 0, interrupt
            )
        assert not (tmp_path / "pairs").exists()

    def test_a_failed_run_keeps_the_earlier_pairs(self, prepare_here, kept_pairs):
        prepare_here([pair_row(0)])
        before = kept_pairs()
        refusal(prepare_here, [pair_row(1, chosen=None)], max_bad_fraction=0.0)
        assert kept_pairs() == before
        prepare_here([pair_row(2)])
        assert kept_pairs() != before
