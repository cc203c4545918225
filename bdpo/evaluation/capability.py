"""What alignment costs elsewhere: GSM8K, HHH and AdvGLUE through lm-evaluation-harness (extra `eval`).

The harness is used as a library on the loaded model, with its chat template. Its own tasks give GSM8K and
HHH; AdvGLUE (Wang et al., arXiv 2111.02840) it has not, so its `glue` templates are given the adversarial
sentences of `AI-Secure/adv_glue`. Answers are not kept. Comparing two models item by item is left out here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bdpo.errors import UserError, first_line
from bdpo.stats import Estimate, rate
from bdpo.storage.manifests import Fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADVGLUE = {
    "adv_sst2": ("sst2", "adv_sst2"),
    "adv_qqp": ("qqp", "adv_qqp"),
    "adv_mnli": ("mnli", "adv_mnli"),
    "adv_mnli_mismatched": ("mnli", "adv_mnli_mismatched"),
    "adv_qnli": ("qnli", "adv_qnli"),
    "adv_rte": ("rte", "adv_rte"),
}
"""Task -> the harness's task whose template it uses, and the configuration of the data set."""

BENCHMARKS: dict[str, dict[str, str]] = {
    "gsm8k": {"gsm8k": "exact_match,flexible-extract"},
    "hhh": {"bigbench_hhh_alignment_multiple_choice": "acc,none"},
    "advglue": dict.fromkeys(ADVGLUE, "acc,none"),
}
"""Benchmark -> its tasks in the harness, and the metric of each: a share of right answers."""

NOT_RUN = "not_run"


@dataclass(frozen=True)
class Accuracies:
    """The result of a benchmark, in the file of its result under these names."""

    accuracy: Estimate
    """Over the items of all tasks."""
    tasks: Mapping[str, Estimate]


@dataclass(frozen=True)
class NotRun:
    """There is no result; the file has the reason under this name, which is `NOT_RUN`."""

    not_run: str


def capability_fingerprint(answers: Fingerprint, limit: int | None) -> Fingerprint:
    """What a result depends on: the model as in `answers`, and the limit."""
    skipped = ("prompts", "evaluate.max_new_tokens", "evaluate.temperature", "evaluate.engine", "seed")
    model = {field: value for field, value in answers.items() if field not in skipped}
    return {**model, "evaluate.limit": limit, "lm_eval": harness_version()}


def harness_version() -> str:
    """The installed version.

    Raises:
        UserError: it is not installed.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lm_eval")
    except PackageNotFoundError:
        raise UserError(
            "evaluate.capability: requires lm-evaluation-harness; pip install 'bdpo[eval]'"
        ) from None


def run_capability(
    benchmark: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    batch_size: int = 8,
    data: Mapping[str, Any] | None = None,
) -> Accuracies | NotRun:
    """The benchmark's accuracy, pooled and per task, or why it was not run.

    A data set that cannot be had is no result and never a zero. `data` replaces keys of our own task
    dictionaries (`dataset_path` and such): AdvGLUE from a copy elsewhere.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    try:
        with tempfile.TemporaryDirectory() as folder:
            specs = [_spec(task, manager, Path(folder), data or {}) for task in BENCHMARKS[benchmark]]
            tasks = manager.load(specs)["tasks"]
    except Exception as error:  # hub, network and datasets have no error in common
        return NotRun(f"{type(error).__name__}: {first_line(error)}")
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    results = simple_evaluate(
        harness,
        tasks=list(tasks.values()),
        limit=limit,
        apply_chat_template=True,
        log_samples=False,
        bootstrap_iters=0,
    )
    return accuracies(benchmark, results)


def accuracies(benchmark: str, results: Mapping[str, Any]) -> Accuracies:
    """From what the harness reports to estimates: of each task, and pooled over all their items."""
    counts = {}
    for task, metric in BENCHMARKS[benchmark].items():
        n = int(results["n-samples"][task]["effective"])
        counts[task] = round(results["results"][task][metric] * n), n
    hits, total = (sum(column) for column in zip(*counts.values(), strict=True))
    return Accuracies(_share(hits, total), {task: _share(*count) for task, count in counts.items()})


def _share(hits: int, n: int) -> Estimate:
    return rate([i < hits for i in range(n)])


def _spec(task: str, manager: Any, folder: Path, data: Mapping[str, Any]) -> str:
    """The name of a task of the harness, or the file of one of ours over its template."""
    if task not in ADVGLUE:
        return task
    template, name = ADVGLUE[task]
    ours = {
        "include": str(manager.task_index[template].yaml_path),
        "task": task,
        "validation_split": "validation",
        "training_split": None,
        "test_split": None,
        "metric_list": [{"metric": "acc"}],
        "dataset_path": "AI-Secure/adv_glue",
        "dataset_name": name,
        **data,
    }
    file = folder / f"{task}.yaml"
    file.write_text(yaml.safe_dump(ours), encoding="utf-8")
    return str(file)
