"""Several data sets as one, columns under other names, labels from a constant; each row in one account."""

from __future__ import annotations

from decimal import Decimal

import pytest

from bdpo.config import parse_config
from bdpo.errors import UserError
from tests.support.data_files import pair_row, refusal, write_csv, write_jsonl, write_parquet


def written(tmp_path, name, rows):
    write = write_parquet if name.endswith("parquet") else write_csv if name.endswith("csv") else write_jsonl
    return str(write(tmp_path / name, rows))


def parse(**data):
    values = {"run_dir": "run", "model": {"name_or_path": "m"}, "data": data}
    return parse_config(values, "test").data


class TestSeveralSources:
    def test_each_has_its_own_format_limit_and_account(self, tmp_path, prepare_here, kept_pairs):
        hh = {side: f"\n\nHuman: hi\n\nAssistant: {side}" for side in ("chosen", "rejected")}
        first = written(tmp_path, "a.jsonl", [pair_row(i) for i in range(5)] + [pair_row(9, chosen="")])
        second = written(tmp_path, "b.parquet", [hh])
        account = prepare_here_list(prepare_here, [{"path": first, "limit": 3}, second])
        assert [(part.format, part.rows, part.kept) for part in account.sources] == [
            ("preference", 3, 3),
            ("hh_rlhf", 1, 1),
        ]
        assert account.to_json()["sources"][1]["source"] == second
        assert [pair["chosen"] for pair in kept_pairs()] == ["no 0", "no 1", "no 2", "chosen"]

    def test_a_pair_of_two_sources_is_kept_once(self, tmp_path, prepare_here):
        files = [
            written(tmp_path, name, [pair_row(0), pair_row(i)])
            for i, name in enumerate(("a.jsonl", "b.jsonl"), 1)
        ]
        account = prepare_here_list(prepare_here, files, max_bad_fraction=0.0)
        assert (account.kept, account.quarantined) == (3, {"duplicate of a pair of another data set": 1})

    def test_a_pair_that_its_weight_leaves_out_of_one_source_is_kept_of_another(
        self, tmp_path, prepare_here, kept_pairs
    ):
        """The kept pairs are those of either draw, in whichever order the sources stand."""
        rows = [pair_row(i) for i in range(60)]
        drawn = {"path": written(tmp_path, "a.jsonl", rows[:50]), "weight": 0.2}
        whole = written(tmp_path, "b.jsonl", rows[10:])
        kept = []
        for path in ([drawn, whole], [whole, drawn]):
            prepare_here_list(prepare_here, path, max_bad_fraction=0.0)
            kept.append(sorted(pair["chosen"] for pair in kept_pairs()))
        assert kept[0] == kept[1]
        assert {row["chosen"] for row in rows[10:]} <= set(kept[0])
        assert 50 < len(kept[0]) < 60  # some of the ten others are drawn

    def test_a_pair_that_stands_twice_in_one_source_is_a_bad_row(self, tmp_path, prepare_here):
        files = [written(tmp_path, "a.jsonl", [pair_row(0)]), written(tmp_path, "b.jsonl", [pair_row(1)] * 2)]
        reason = refusal(prepare_here_list, prepare_here, files, max_bad_fraction=0.1)
        assert f"data.path={files[1]}: 1 of 2 rows read as preference are bad" in reason
        assert "(duplicate ×1); the first is row 2" in reason

    def test_quarantined_rows_name_their_source(self, tmp_path, prepare_here, quarantined_rows):
        files = [written(tmp_path, f"{i}.jsonl", [pair_row(i), pair_row(5 + i, chosen="")]) for i in range(2)]
        prepare_here_list(prepare_here, files)
        assert [(row["source"], row["row"]) for row in quarantined_rows()] == [(file, 2) for file in files]

    def test_a_bad_source_does_not_hide_among_good_ones(self, tmp_path, prepare_here):
        good = written(tmp_path, "good.jsonl", [pair_row(i) for i in range(50)])
        bad = written(tmp_path, "bad.jsonl", [pair_row(90), pair_row(91, chosen="")])
        reason = refusal(prepare_here_list, prepare_here, [good, bad], max_bad_fraction=0.1)
        assert f"data.path={bad}: 1 of 2 rows" in reason

    def test_a_weight_draws_the_same_part_whatever_else_is_read(self, tmp_path, prepare_here, kept_pairs):
        first = written(tmp_path, "a.jsonl", [pair_row(i) for i in range(400)])
        second = written(tmp_path, "b.jsonl", [pair_row(i) for i in range(400, 500)])
        account = prepare_here_list(prepare_here, [{"path": first, "weight": 0.25}, second])
        part = account.sources[0]
        assert 60 < part.kept < 140  # 100 ± 5σ
        assert part.kept + part.not_sampled == part.rows == 400
        drawn = {pair["pair_id"] for pair in kept_pairs()}
        prepare_here_list(prepare_here, [second, {"path": first, "weight": 0.25}])
        assert {pair["pair_id"] for pair in kept_pairs()} == drawn

    def test_keys_of_the_section_hold_where_a_source_sets_none(self):
        data = parse(path=["a", {"path": "b", "split": "test"}], split="dev", labels={"group": "safe"})
        assert [(source.path, source.split, source.labels.group) for source in data.sources()] == [
            ("a", "dev", "safe"),
            ("b", "test", "safe"),
        ]
        assert data.names == "a, b"


def prepare_here_list(prepare_here, path, **config):
    return prepare_here(None, path=path, **config)


class TestColumns:
    def test_other_names(self, tmp_path, prepare_here, kept_pairs):
        row = {"question": "q", "good": "yes", "bad": "no", "kind": "unsafe", "prompt": "of another kind"}
        columns = {"prompt": "question", "chosen": "good", "rejected": "bad", "group": "kind"}
        for name in ("rows.jsonl", "rows.csv", "rows.parquet"):
            account = prepare_here(written(tmp_path, name, [row]), columns=columns)
            pair = kept_pairs()[0]
            assert (pair["prompt"][0]["content"], pair["chosen"], pair["group"]) == ("q", "yes", "unsafe")
            assert account.sources[0].unread == {"prompt (in the file)"}

    def test_two_columns_can_change_places(self, prepare_here, kept_pairs):
        prepare_here([pair_row(0)], columns={"chosen": "rejected", "rejected": "chosen"})
        assert (kept_pairs()[0]["chosen"], kept_pairs()[0]["rejected"]) == ("yes 0", "no 0")

    @pytest.mark.parametrize(
        ("columns", "named"),
        [
            ({"prompt": "question"}, "data.columns.prompt=question: "),
            ({"promt": "prompt"}, "data.columns.promt: no format reads a column of this name"),
        ],
    )
    def test_what_is_not_there_is_named(self, prepare_here, columns, named):
        assert named in refusal(prepare_here, [pair_row(0)], columns=columns)


class TestLabels:
    def test_a_constant_is_for_rows_that_have_none(self, prepare_here, kept_pairs):
        rows = [pair_row(0), pair_row(1, group="safe", chosen_safe=False)]
        prepare_here(rows, labels={"group": "unsafe", "chosen_safe": True})
        assert [(pair["group"], pair["chosen_safe"]) for pair in kept_pairs()] == [
            ("unsafe", True),
            ("safe", False),
        ]

    def test_exact_decimals_are_labels(self, tmp_path, prepare_here, kept_pairs):
        rows = [pair_row(0, chosen_safe=Decimal(1), rejected_safe=Decimal(0))]
        prepare_here(write_parquet(tmp_path / "rows.parquet", rows))
        assert (kept_pairs()[0]["chosen_safe"], kept_pairs()[0]["rejected_safe"]) == (True, False)

    @pytest.mark.parametrize("value", [1, 1.0, True])
    def test_exact_numbers_are_labels(self, prepare_here, kept_pairs, value):
        prepare_here([pair_row(0, chosen_safe=value, rejected_safe=False)])
        assert (kept_pairs()[0]["chosen_safe"], kept_pairs()[0]["rejected_safe"]) == (True, False)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"path": []}, "data"),
        ({"path": [{"split": "x"}]}, "data.path"),
        ({"path": [{"path": "a", "weight": 0}]}, "weight"),
        ({"path": [{"path": "a", "weight": 2}]}, "weight"),
        ({"path": [{"path": "a", "limt": 2}]}, "limt"),
        ({"path": 7}, "data.path"),
        ({"path": "a", "labels": {"group": "mixed"}}, "data.labels.group"),
        ({"path": "a", "columns": ["prompt"]}, "data.columns"),
        ({"path": "a", "limit": 0}, "data.limit"),
    ],
)
def test_a_wrong_section_is_named(data, named):
    with pytest.raises(UserError) as caught:
        parse(**data)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_format_is_named_with_the_nearest(prepare_here):
    assert "data.format=shargpt: unknown format; did you mean sharegpt?" in refusal(
        prepare_here, [pair_row(0)], format="shargpt"
    )
    assert "it is one of auto, preference" in refusal(prepare_here, [pair_row(0)], format="zzz")


def test_a_pair_that_stands_twice_with_other_labels_has_its_own_reason(tmp_path, prepare_here):
    row = {"prompt": "What sings at dawn?", "chosen": "A lark.", "rejected": "A stone."}
    again = [row | {"group": "safe"}, row | {"group": "unsafe"}, row | {"group": "safe"}]
    other = {"prompt": "What swims?", "chosen": "A pike.", "rejected": "A stone."}
    source = write_jsonl(tmp_path / "rows.jsonl", [*again, other])
    assert prepare_here(source).quarantined == {"duplicate, with other labels": 1, "duplicate": 1}
