"""What can be known before a GPU is taken: model, data, chat template, storage, batches, hours.

A check returns one line: what it found, a `Doubt` where the user should look twice, or raises the
UserError that would stop the run. None of them needs Ray: `pipelines.preflight` asks the nodes, and
`bdpo.cluster.node_checks` looks at what they answered.
"""

from __future__ import annotations

import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bdpo.cluster.status import expected_pairs
from bdpo.config import Config, DataConfig, TuneConfig, worker_range
from bdpo.config.derive import in_words_of_tamper, tampering_config
from bdpo.data.formats.base import Pair
from bdpo.data.prepare import first_pairs, reasons_text
from bdpo.data.sources import count_rows, open_source
from bdpo.errors import UserError, error_line
from bdpo.evaluation.benchmarks.registry import load_items
from bdpo.evaluation.judges.registry import judge_kind, judge_note
from bdpo.models.adapters import adapter_folder, check_lora, require_complete_adapter
from bdpo.models.architectures import has_plain_lm_head
from bdpo.models.loading import model_config, newer_than_installed, require_complete_weights
from bdpo.models.tokenizer import ChatTokenizer, EncodedPair, load_tokenizer
from bdpo.search.space import check_space
from bdpo.storage.paths import read_bytes, write_bytes
from bdpo.storage.records import prepared_pairs
from bdpo.storage.run_dir import RunDir
from bdpo.training.batches import plan_without_lengths
from bdpo.variants.objective import check_measures

AUDITED_PAIRS = 10


@dataclass(frozen=True)
class Doubt:
    """What was found and what to look at: it stops no run."""

    text: str


@dataclass(frozen=True)
class CheckResult:
    """A row of the table."""

    check: str
    level: Literal["ok", "warning", "error"]
    text: str


Check = Callable[..., str | Doubt]


def examine(checks: Mapping[str, Check], *arguments: Any) -> Iterator[CheckResult]:
    """The result of every check; a UserError is an error."""
    for name, check in checks.items():
        try:
            found = check(*arguments)
        except UserError as error:
            yield CheckResult(name, "error", str(error))
        else:
            if isinstance(found, Doubt):
                yield CheckResult(name, "warning", found.text)
            else:
                yield CheckResult(name, "ok", found)


def check_model(config: Config, run: RunDir) -> str | Doubt:
    """Tokenizer and template can be used, and the weights are complete."""
    load_tokenizer(config.model)
    require_complete_weights(config.model)
    hf_config = model_config(config.model)
    kind = hf_config.model_type
    if config.data.select and config.data.select.ches and not has_plain_lm_head(hf_config):
        raise UserError(f"data.select.ches: {kind} models have no CHES; select by mi_difference")
    found = f"{config.model.name_or_path}: {kind}, {config.model.dtype}"
    note = newer_than_installed(hf_config)
    return Doubt(f"{found}; {note}") if note else found


def check_data(config: Config, run: RunDir) -> str:
    """The data can be read and have a known format."""
    found = [f"{source.path}: {open_source(source).format.name}" for source in config.data.sources()]
    return f"data.path={', '.join(found)}"


def check_benchmarks(config: Config, run: RunDir) -> str:
    """Every configured benchmark has its prompts."""
    counts = Counter(item.benchmark for item in load_items(config.evaluate))
    return ", ".join(f"{count} prompts of {name}" for name, count in counts.items())


def check_adapters(config: Config, run: RunDir) -> str:
    """The adapters of `train.lora` fit the model."""
    check_lora(config)
    return f"rank {config.train.lora.r}" if config.train.lora else "none"


def check_evaluated_adapter(config: Config, run: RunDir) -> str:
    """The adapter of `evaluate.adapter` is complete, and one of the model."""
    if config.evaluate.adapter is None:
        return "none"
    require_complete_adapter(adapter_folder(config.evaluate.adapter, "evaluate.adapter"), config.model)
    return config.evaluate.adapter


def check_tamper(config: Config, run: RunDir) -> str:
    """The data and the adapters of the tamper test fit the model, as far as the untrained one shows."""
    tamper = config.tamper
    if tamper is None:
        return "none"
    tampering = tampering_config(config, tamper, config.model.name_or_path, config.run_dir)
    try:
        check_lora(tampering.model_copy(update={"model": config.model}))
        found = check_data(tampering, run) if tamper.data else "the run's own pairs of safe queries"
    except UserError as error:
        raise UserError(in_words_of_tamper(str(error))) from None
    return f"{tamper.steps} steps, rank {tamper.lora.r}, on {in_words_of_tamper(found)}"


def check_template(config: Config, run: RunDir) -> str | Doubt:
    """BOS once, the end of the turn once and last, the conversation as the template itself would write it."""
    chat, data = load_tokenizer(config.model), config.data
    audited, bad = first_pairs(data, chat, AUDITED_PAIRS)
    if not audited:
        raise UserError(
            f"data.path={data.names}: none of the first rows can be used ({reasons_text(Counter(bad))})"
        )
    encoded = [ids for _, ids in audited]
    bos = chat.tokenizer.bos_token_id
    if bos is not None and any(ids.prompt[:2] == [bos, bos] or ids.chosen[0] == bos for ids in encoded):
        raise UserError(
            f"model.name_or_path={config.model.name_or_path}: chat template and tokenizer both write a BOS; "
            "set model.chat_template to a template that fits"
        )
    doubts = [doubt for pair, ids in audited for doubt in _doubts(chat, data, pair, ids)] + bad
    begin = "BOS first" if encoded[0].prompt[0] == bos else "no BOS"
    end = chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn_id)
    found = f"{len(audited)} pairs: {begin}, turns end with {end}"
    return Doubt(f"{found}, but {reasons_text(Counter(doubts))}: is that what you want?") if doubts else found


def _doubts(chat: ChatTokenizer, data: DataConfig, pair: Pair, ids: EncodedPair) -> Iterator[str]:
    """What is odd about the token ids of a pair, in fixed phrases: no text of it leaves here."""
    special = set(chat.tokenizer.all_special_ids)
    for response in (ids.chosen, ids.rejected):
        if len(ids.prompt) + len(response) == data.max_length:
            yield f"response fills data.max_length={data.max_length} and may be cut"
        elif special & set(response[:-1]):
            yield "special token inside a response"
    whole = chat.prompt_ids([*pair.prompt, pair.chosen, {"role": "user", "content": "x"}])
    ours = chat.prompt_ids(pair.prompt) + chat.response_ids(pair.chosen["content"])
    if whole[: len(ours)] != ours:
        yield "the template writes the answer in another way once the conversation continues"


def check_batches(config: Config, run: RunDir) -> str | Doubt:
    """Workers, global batch and micro-batches fit one another."""
    train, data = config.train, config.data
    share = train.global_batch_size / train.max_workers
    found = f"{train.global_batch_size} pairs a step, {share:g} a worker"
    if train.max_workers > train.min_workers:
        found += f" if there are {train.max_workers}, {train.global_batch_size / train.min_workers:g} if "
        found += f"{train.min_workers}"
    steps = None
    if pairs := prepared_pairs(run):
        steps = plan_without_lengths(pairs, config.train, config.seed).total_steps
        found += f"; {pairs} pairs make {steps} steps"
    if train.global_batch_size < train.max_workers:
        return Doubt(f"{found}: some workers have no work at any step; set train.global_batch_size higher")
    longest = 2 * data.max_length - 1
    if train.tokens_per_micro_batch < longest:
        return Doubt(
            f"{found}; a pair of up to {longest} tokens is more than train.tokens_per_micro_batch="
            f"{train.tokens_per_micro_batch} and stands alone: is there memory for it?"
        )
    if steps and (train.save_steps or 0) > steps and not train.minutes_between_saves:
        return Doubt(f"{found}; train.save_steps={train.save_steps} saves at the end alone: lower it")
    return found


def check_storage(config: Config, run: RunDir) -> str:
    """The run folder or bucket can be written, read and cleaned."""
    probe, content = run.root / f".preflight-{uuid.uuid4().hex}", os.urandom(64)
    try:
        write_bytes(probe, content)
        whole = read_bytes(probe) == content
        probe.unlink()
    except Exception as error:  # every protocol of fsspec has errors of its own
        raise UserError(f"run_dir={run.root}: cannot be written ({error_line(error)})") from None
    if not whole:
        raise UserError(f"run_dir={run.root}: does not give back what was written")
    return f"run_dir={run.root}: written and read"


def check_search(config: Config, run: RunDir) -> str:
    """What `tune.search` would vary can be varied, and what it goes by is measured."""
    tune = config.tune
    if tune == TuneConfig():
        return "no section tune"
    check_space(config)
    check_measures(config)
    return f"{', '.join(tune.space)} for {tune.metric}, bound by {tune.constraint}"


def check_judge_requirements(config: Config, run: RunDir) -> str:
    """The judge can judge: weights are there, an endpoint answers, the prompts are of its world."""
    kind = judge_kind(config)
    found = kind.check(config)
    if kind.check_items:
        kind.check_items(config, load_items(config.evaluate))
    judge_note(config)  # an agreement that did not measure it is refused
    return found


def expected_hours(config: Config, run: RunDir, tokens_per_second: float | None) -> str | Doubt:
    """Tokens of scoring and training, and how long they take at a scoring throughput of one worker.

    A trained token costs three times a scored one, forward and backward; four times if activations are
    computed again (`train.gradient_checkpointing`). Answers of the evaluation are left out.
    """
    chat = load_tokenizer(config.model)
    encoded = _encoded(config, chat)
    pair_tokens = sum(_tokens(ids) for ids in encoded) / len(encoded)
    pairs = expected_pairs(config, run) or count_rows(config.data)
    score_tokens = pairs * pair_tokens
    steps = plan_without_lengths(pairs, config.train, config.seed).total_steps
    train_tokens = steps * min(config.train.global_batch_size, pairs) * pair_tokens
    found = (
        f"{score_tokens / 1e6:.3g} M tokens to score, {train_tokens / 1e6:.3g} M to train in {steps} steps"
    )
    if tokens_per_second is None:
        return Doubt(f"{found}; for the hours give --tokens-per-second N or --measure")
    score = score_tokens / tokens_per_second / worker_range(config.score.workers)[1] / 3600
    passes = 4 if config.train.gradient_checkpointing else 3
    train = passes * train_tokens / tokens_per_second / config.train.max_workers / 3600
    hours = f"{score:.2g} h to score, {train:.2g} h to train"
    return f"{found}; at {tokens_per_second:,.0f} tokens a second and worker {hours}"


def measure_throughput(config: Config, device: str, seconds: float = 20) -> float:
    """Tokens a second that the reference model scores of the first pairs, on one worker."""
    from bdpo.models.packing import PrefixGroups
    from bdpo.scoring.reference import ReferenceScorer, reference_logps

    scorer = ReferenceScorer(config, device)
    pairs = PrefixGroups.of(_encoded(config, scorer.chat))
    passes, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        reference_logps(scorer.model, pairs, scorer.unconditional, config.score.tokens_per_batch)
        passes += 1
        if passes == 1:  # the first one compiles and warms up
            begun = time.perf_counter()
    return (passes - 1) * int(pairs.lengths.sum()) / (time.perf_counter() - begun)


def _encoded(config: Config, chat: ChatTokenizer) -> list[EncodedPair]:
    pairs, _ = first_pairs(config.data, chat, AUDITED_PAIRS)
    return [ids for _, ids in pairs]


def _tokens(ids: EncodedPair) -> int:
    return len(ids.prompt) + len(ids.chosen) + len(ids.rejected)
