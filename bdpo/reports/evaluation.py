"""The evaluated models on a page: their numbers, their differences as sentences, and the tamper test."""

from __future__ import annotations

from itertools import combinations

from bdpo.evaluation.benchmarks.registry import BENCHMARKS, is_main, measure_label
from bdpo.evaluation.compare import compare
from bdpo.evaluation.results import Evaluation, incomparable_field
from bdpo.evaluation.tables import comparison_rows, invalid_lines, judged_by, note_lines, with_judge_error
from bdpo.reports.page import PageSection, PageTable
from bdpo.stats import SIGNIFICANT, Difference, p_value, points
from bdpo.storage.records import training_record
from bdpo.storage.run_dir import RunDir


def evaluation_section(evaluations: dict[str, Evaluation]) -> PageSection | None:
    """The evaluated models side by side, and a sentence for each difference."""
    if not evaluations:
        return None
    rows = [
        (f"– {row.category}" if row.category else row.measure, row.n, *row.cells)
        for row in comparison_rows([read.summary for read in evaluations.values()])
    ]
    notes = [
        line
        for name, read in evaluations.items()
        for line in (*invalid_lines(name, read.summary), *note_lines(name, read.summary))
    ]
    judges = "".join(dict.fromkeys(judged_by(read.judge) for read in evaluations.values()))
    caption = f"With 95 % intervals over clusters of prompts{judges}."
    table = PageTable(("percent", "n", *evaluations), rows, caption)
    differences = comparison_sentences(evaluations)
    if len(differences) > 1:
        notes.append(
            f"The {len(differences)} tests below are not corrected for their number: where nothing differs, "
            "up to one in 20 has p < 0.05."
        )
    return PageSection("Safety and usefulness", [*notes, *differences], [table])


def comparison_sentences(evaluations: dict[str, Evaluation], main_only: bool = False) -> list[str]:
    """The difference of every two models in each measure, as sentences; one where they do not compare."""
    found = []
    for first, second in combinations(evaluations, 2):
        one, other = evaluations[first], evaluations[second]
        if field := incomparable_field(one.fingerprint, other.fingerprint):
            found.append(f"{second} and {first} are not compared: evaluated with different {field}.")
            continue
        judge = one.judge.or_worse(other.judge)
        for row in compare(one.scores, other.scores):
            if not main_only or is_main(row.benchmark, row.measure):
                label = measure_label(row.benchmark, row.measure)
                reach = judge.reach.get(BENCHMARKS[row.benchmark].rubric)
                found.append(comparison_sentence(label, first, second, row.difference, reach))
    return found


def comparison_sentence(
    measure: str, first: str, second: str, found: Difference, reach: float | None = None
) -> str:
    """One comparison as a sentence; `reach` is the judge's own error between two models, if known."""
    change = f"{points(found.difference)} points"
    change += f" (95 % interval {points(found.low)} to {points(found.high)})"
    meant = "more than the choice of prompts explains" if found.is_clear else "chance may explain it"
    if found.p < SIGNIFICANT and not found.is_clear:
        meant = f"the interval includes 0: {meant}"
    values = f"{second} {100 * found.second:.1f} %, {first} {100 * found.first:.1f} %"
    if reach is not None:
        meant += f"; with the judge's own error {with_judge_error(found, reach)}"
    return f"{measure}: {values}: {change}, p {p_value(found.p)}, {meant}."


def tamper_section(run: RunDir, evaluations: dict[str, Evaluation]) -> PageSection | None:
    """How much of the aligned model's safety is left after the tamper test."""
    if not {"trained", "tampered"} <= evaluations.keys():
        return None
    record = training_record(run.tampering(own_data=False))
    if record is None:
        return None
    train, data = record.config["train"], record.config["data"]
    paths = [data] if isinstance(data["path"], str) else data["path"]
    named = ", ".join(source["path"] for source in paths)
    benign = " whose queries are labelled safe" if (data.get("select") or {}).get("group") == "safe" else ""
    pairs = record.pairs["trained on"]
    did = (
        f"The trained model was trained {record.steps} more steps with LoRA (rank {train['lora']['r']}, "
        f"learning rate {train['learning_rate']:g}, {train['global_batch_size']} responses a step) on the "
        f"chosen responses of {pairs:,} pairs of {named}{benign}. What that changed, judged by "
        f"{evaluations['tampered'].judge.label}:"
    )
    both = {name: evaluations[name] for name in ("trained", "tampered")}
    return PageSection("Tamper test", [did, *comparison_sentences(both)])
