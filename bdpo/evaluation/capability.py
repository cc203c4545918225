"""What alignment costs elsewhere: GSM8K, HHH and AdvGLUE through lm-evaluation-harness (extra `eval`).

The harness is used as a library on the loaded model, with its chat template. Its own tasks give GSM8K and
HHH; AdvGLUE (Wang et al., arXiv 2111.02840) it has not, so its `glue` templates are given the adversarial
sentences of `AI-Secure/adv_glue`, or of a local `dev.json`. Answers are not kept. Comparing two models
item by item is left out here.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bdpo.config.evaluate import CapabilityFiles
from bdpo.errors import UserError, first_line
from bdpo.evaluation.benchmarks.items import read_columns
from bdpo.stats import Estimate, rate
from bdpo.storage import strict_json
from bdpo.storage.manifests import Fingerprint
from bdpo.storage.paths import require_fetched

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
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

TASKS: dict[str, dict[str, str]] = {
    "gsm8k": {"gsm8k": "exact_match,flexible-extract"},
    "hhh": {"bigbench_hhh_alignment_multiple_choice": "acc,none"},
    "advglue": dict.fromkeys(ADVGLUE, "acc,none"),
}
"""Benchmark -> its tasks in the harness, and the metric of each: a share of right answers."""

FOLDERS = ("glue", "gsm8k", "bigbench/multiple_choice")
"""Where the harness keeps the definitions of these tasks, below its own package."""

EXAMPLES = 5
"""Of a question of GSM8K, in the harness's task."""

_ADVGLUE_ROWS = {
    "sst2": (("sentence",), 2),
    "qqp": (("question1", "question2"), 2),
    "mnli": (("premise", "hypothesis"), 3),
    "mnli-mm": (("premise", "hypothesis"), 3),
    "qnli": (("question", "sentence"), 2),
    "rte": (("sentence1", "sentence2"), 2),
}
"""Task as `dev.json` calls it -> the texts of a row, and how many classes there are."""

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


def read_result(facts: Mapping[str, Any]) -> Accuracies | NotRun:
    """The inverse of `asdict` on a result, from the facts of its file."""
    if NOT_RUN in facts:
        return NotRun(facts[NOT_RUN])
    tasks = {task: Estimate(**found) for task, found in facts["tasks"].items()}
    return Accuracies(Estimate(**facts["accuracy"]), tasks)


def capability_fingerprint(
    answers: Fingerprint, limit: int | None, files: CapabilityFiles | None = None
) -> Fingerprint:
    """What a result depends on: the model as in `answers`, the limit, and the content of local data.

    Raises:
        UserError: a file of local data cannot be read, or is not what its benchmark expects.
    """
    skipped = ("prompts", "evaluate.max_new_tokens", "evaluate.temperature", "evaluate.engine", "seed")
    model = {field: value for field, value in answers.items() if field not in skipped}
    local = {
        f"evaluate.capability_files.{name}": _digest(name, path)
        for name, path in (files.model_dump() if files else {}).items()
        if path
    }
    return {**model, "evaluate.limit": limit, "lm_eval": harness_version(), **local}


def _digest(benchmark: str, path: str) -> str:
    (_require_gsm8k if benchmark == "gsm8k" else _require_advglue)(path)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _require_gsm8k(file: str) -> None:
    if Path(file).suffix.lower() == ".csv":
        raise UserError(f"{file}: expects JSON Lines, not CSV")
    rows = read_columns(file, ("question", "answer"))
    if len(rows) <= EXAMPLES:
        raise UserError(
            f"{file}: has {len(rows)} rows, expects {EXAMPLES + 1} or more: a question stands behind "
            f"{EXAMPLES} other rows"
        )


def _require_advglue(file: str) -> None:
    require_fetched(Path(file))
    try:
        content = strict_json.loads(Path(file).read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):  # the error's own text quotes the file
        raise UserError(f"{file}: not valid JSON") from None
    for task, (columns, classes) in _ADVGLUE_ROWS.items():
        rows = content.get(task) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not rows:
            raise UserError(f"{file}: expects AdvGLUE's dev.json, an object with a list of rows under {task}")
        for number, row in enumerate(rows, 1):
            where = f"{file}, key {task}, row {number}"
            for column in columns:
                if not isinstance(row, dict) or not isinstance(row.get(column), str):
                    raise UserError(f"{where}, key {column}: expects a text")
            if type(row.get("label")) is not int or not 0 <= row["label"] < classes:
                raise UserError(f"{where}, key label: expects a whole number from 0 to {classes - 1}")


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
    file: str | None = None,
) -> Accuracies | NotRun:
    """The benchmark's accuracy, pooled and per task, or why it was not run.

    A data set that is unavailable is no result and never a zero. `file` is a local copy of the benchmark's
    data, see `CapabilityFiles`: nothing is then read from a hub.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = task_manager()
    try:
        with tempfile.TemporaryDirectory() as folder:
            specs = [_spec(task, manager, Path(folder), file) for task in TASKS[benchmark]]
            tasks = manager.load(specs)["tasks"]
    except Exception as error:  # hub, network and datasets have no error in common
        return NotRun(f"{type(error).__name__}: {first_line(error)}")
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    results = simple_evaluate(
        harness,
        tasks=list(tasks.values()),
        task_manager=manager,
        limit=limit,
        apply_chat_template=True,
        log_samples=False,
        bootstrap_iters=0,
    )
    return accuracies(benchmark, results)


def task_manager() -> TaskManager:
    """The harness's own index of the tasks in `FOLDERS`: it takes seconds to read all its 13,000 tasks."""
    import lm_eval.tasks

    folders = [Path(lm_eval.tasks.__file__).parent / name for name in FOLDERS]
    return lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)


def accuracies(benchmark: str, results: Mapping[str, Any]) -> Accuracies:
    """The harness's report as estimates: of each task, and pooled over all their items."""
    counts = {}
    for task, metric in TASKS[benchmark].items():
        n = int(results["n-samples"][task]["effective"])
        counts[task] = round(results["results"][task][metric] * n), n
    hits, total = (sum(column) for column in zip(*counts.values(), strict=True))
    return Accuracies(_share(hits, total), {task: _share(*count) for task, count in counts.items()})


def _share(hits: int, n: int) -> Estimate:
    return rate([i < hits for i in range(n)])


_OTHER_ROWS = {"training_split": None, "fewshot_split": "test"}
"""Keys of a harness's task whose worked examples are other rows of the test split."""


def _spec(task: str, manager: TaskManager, folder: Path, file: str | None) -> str:
    """The name of a task of the harness, or the file of one of ours over its template."""
    if task in ADVGLUE:
        template, ours = ADVGLUE[task][0], _adversarial(task, file)
    elif file:
        template, ours = task, {**_local(file, "test"), **_OTHER_ROWS}
    else:
        return task
    include = {"include": str(manager.task_index[template].yaml_path), "task": task}
    spec = folder / f"{task}.yaml"
    spec.write_text(yaml.safe_dump({**include, **ours}), encoding="utf-8")
    return str(spec)


def _adversarial(task: str, file: str | None) -> Mapping[str, Any]:
    """What a task of AdvGLUE changes in the template of its GLUE task."""
    splits = {"validation_split": "validation", "training_split": None, "test_split": None}
    hub = {"dataset_path": "AI-Secure/adv_glue", "dataset_name": ADVGLUE[task][1]}
    name = task.removeprefix("adv_").replace("_mismatched", "-mm")  # as dev.json calls it
    data: Mapping[str, Any] = _local(file, "validation", field=name) if file else hub
    return {**splits, "metric_list": [{"metric": "acc"}], **data}


def _local(file: str, split: str, **reading: str) -> Mapping[str, Any]:
    """The keys of a harness's task that read a local JSON file as one split."""
    files = {"data_files": {split: str(Path(file).resolve())}}
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files | reading}
