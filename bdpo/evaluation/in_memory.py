"""Evaluating a loaded model in memory: no run folder, no Ray, nothing printed.

`import bdpo` offers it as `bdpo.evaluate_model`. `pipelines.evaluate` asks, judges and counts by the same
functions, so both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import pyarrow as pa

from bdpo.config import Config, parse_config
from bdpo.errors import UserError
from bdpo.evaluation.answers import planned_items, prompts_fingerprint
from bdpo.evaluation.benchmarks.items import Item
from bdpo.evaluation.judges.base import Judge
from bdpo.evaluation.judges.registry import judge_fingerprint, judge_kind, judge_note, make_judge
from bdpo.evaluation.measures import VERDICT_SCHEMA, summarise
from bdpo.evaluation.responses import Questionnaire, Response, verdict_row, verdicts_on
from bdpo.evaluation.results import Evaluation, valid_scores
from bdpo.models.borrowed import borrowed_chat, in_evaluation_mode
from bdpo.sandbox import with_sandbox_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class EvaluationSettings(TypedDict, total=False):
    """Keys of the section `evaluate` (docs/config.md), with the same defaults; and two of other sections."""

    limit: int
    part: Literal["all", "search", "held_out"]
    held_out: float | list[str]
    max_new_tokens: int
    temperature: float
    samples: int
    batch_size: int
    seed: int
    """The run's: of the answers where `temperature` is above 0."""
    template_kwargs: dict[str, Any]
    """Of `model`."""


@dataclass(frozen=True)
class ModelEvaluation(Evaluation):
    """The evaluation of a model in memory: summary, scores, judge, and what the model wrote.

    `fingerprint` is that of prompts, lengths and judge: two evaluations whose fingerprints are equal can be
    compared, by `bdpo.evaluation.compare.compare_all` with their scores.
    """

    responses: tuple[Response, ...] = field(default=(), repr=False)
    """One an item, in the order of the scores. The texts may be harmful."""


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmarks: Mapping[str, Mapping[str, Any]],
    judge: Mapping[str, Any] | None = None,
    **settings: Unpack[EvaluationSettings],
) -> ModelEvaluation:
    """Ask a model the prompts of some benchmarks, and judge its answers.

    `benchmarks` are sections of `evaluate` by name, such as `{"strongreject": {"path": "prompts.csv"}}`, and
    `judge` is `evaluate.judge`, such as `{"name": "string_matching"}`, which is the default. The model
    generates on its device, without dropout, and is afterwards in its mode of before; a judge that is a local
    model is loaded onto a GPU if the model is on one. The results hold each measure as an `Estimate`, a
    fraction in [0, 1] with its 95 % interval: `evaluation.summary.estimate("strongreject.safety")`.

    Raises:
        TypeError: `model` is not a PreTrainedModel of transformers.
        UserError: a benchmark, the judge or a setting is unknown or wrong, a file cannot be read, or the
            judge cannot judge; the tokenizer has no chat template, or one that cannot be used.
    """
    config = _config(benchmarks, judge, settings, on_gpu=model.device.type == "cuda")
    chat = borrowed_chat(model, tokenizer, config.model.template_kwargs)
    items = planned_items(config)
    asked_judge = _checked_judge(config, items)
    questionnaire = Questionnaire(config.evaluate, config.seed, chat, model.config)
    responses: list[Response] = []
    with in_evaluation_mode(model):
        from bdpo.evaluation.engines.hf import generate

        for first in range(0, len(items), config.evaluate.batch_size):
            batch = items[first : first + config.evaluate.batch_size]
            responses += questionnaire.responses(partial(generate, model, chat), batch)
    verdicts = verdicts_on(asked_judge, items, responses)
    rows = pa.Table.from_pylist(list(map(verdict_row, items, responses, verdicts)), schema=VERDICT_SCHEMA)
    summary, scores = summarise(rows), rows.sort_by("item_id")
    by_id = tuple(sorted(responses, key=lambda response: response.item_id))
    fingerprint = {**prompts_fingerprint(config), **judge_fingerprint(config)}
    return ModelEvaluation(
        summary, valid_scores(summary, scores), fingerprint, judge_note(config), responses=by_id
    )


def _config(
    benchmarks: Mapping[str, Mapping[str, Any]],
    judge: Mapping[str, Any] | None,
    settings: EvaluationSettings,
    on_gpu: bool,
) -> Config:
    """The config of the evaluation; what it says of model, data and run folder is not looked at."""
    evaluate: dict[str, Any] = {**settings}
    if unknown := evaluate.keys() - EvaluationSettings.__annotations__.keys():
        known = ", ".join(EvaluationSettings.__annotations__)
        raise UserError(f"evaluate_model: {', '.join(sorted(unknown))}: not one of {known}")
    values: dict[str, Any] = {
        "run_dir": "in memory",
        "seed": evaluate.pop("seed", 0),
        "model": {"name_or_path": "in memory", "template_kwargs": evaluate.pop("template_kwargs", {})},
        "data": {"path": "in memory"},
    }
    evaluate |= {"gpus_per_worker": float(on_gpu), "benchmarks": list(benchmarks)}
    evaluate |= {name: dict(section) for name, section in benchmarks.items()}
    evaluate |= {} if judge is None else {"judge": dict(judge)}
    return with_sandbox_files(parse_config({**values, "evaluate": evaluate}, "evaluate_model"))


def _checked_judge(config: Config, items: Sequence[Item]) -> Judge:
    """The judge, after the checks that `pipelines.evaluate` makes before it begins."""
    kind = judge_kind(config)
    kind.check(config)
    if kind.check_items:
        kind.check_items(config, items)
    return make_judge(config)
