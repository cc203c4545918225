"""Section `evaluate`."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from bdpo.config.base import Workers
from bdpo.section import Fraction, Positive, Section

BenchmarkName = Literal["strongreject", "xstest", "jailbreak", "prefill", "wrapped", "simpleqa"]
"""Each is a module of `bdpo.evaluation.benchmarks`; tables have them in this order."""

JudgeName = Literal["string_matching", "rubric", "finetuned", "sandbox"]
"""Each is a module of `bdpo.evaluation.judges`."""


class EvaluateConfig(Section):
    """Which benchmarks are run, over which prompts, and who judges."""

    benchmarks: list[BenchmarkName] = Field(["strongreject", "xstest"], min_length=1)
    judge: JudgeName = "string_matching"
    limit: Positive | None = Field(None, description="at most so many prompts of each benchmark")
    part: Literal["all", "search", "held_out"] = Field("all", description="of the prompts, see held_out")
    held_out: Fraction | list[str] = Field(
        0.5, description="what a search never sees: a share of the requests, or whole categories by name"
    )
    max_new_tokens: Positive = 256
    temperature: float = Field(0.0, ge=0, description="0 is greedy; else sampled, with the run's seed")
    batch_size: Positive = Field(32, description="prompts generated for together, and committed together")
    engine: Literal["transformers", "vllm"] = Field("transformers", description="vllm: wants extra and GPU")
    workers: Workers = 1
    gpus_per_worker: float = Field(1.0, ge=0)
    adapter: str | None = Field(None, description="folder or hub id of a LoRA adapter to evaluate as well")
    strongreject_path: str | None = Field(None, description="CSV: category,source,forbidden_prompt; or a URL")
    strongreject_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="a URL wants it")
    strongreject_subset: Literal["full", "small"] = Field("full", description="small: ten of each category")
    xstest_path: str | None = Field(None, description="CSV: id,prompt,type,label,focus,note")
    jailbreak_paths: list[str] = Field([], description="JailbreakBench artifacts (JSON), one an attack")
    wrappers: list[Literal["past_tense", "role_play"]] = Field(
        ["past_tense", "role_play"], description="templates put around the StrongReject prompts"
    )
    prefill_path: str | None = Field(None, description="CSV: category,forbidden_prompt,compliant_answer")
    prefill_tokens: list[Positive] = Field([5, 10, 20, 40], description="tokens of it put into its mouth")
    simpleqa_path: str | None = Field(None, description="CSV: metadata,problem,answer")
    capability: list[Literal["gsm8k", "hhh", "advglue"]] = Field([], description="wants the extra `eval`")
    judge_base_url: str | None = Field(None, description="OpenAI-compatible endpoint, as http://host:8000/v1")
    judge_model: str | None = Field(
        None, description="what the endpoint calls the judge; `finetuned`: a path"
    )
    judge_api_key_env: str | None = Field(None, description="NAME of the environment variable with the key")
    judge_timeout: float = Field(60.0, gt=0, description="seconds for one reply")
    judge_retries: int = Field(5, ge=0, description="of connection errors, 429 and 5xx, with backoff")
    judge_concurrency: Positive = Field(8, description="requests at the endpoint at a time")

    @model_validator(mode="after")
    def _nothing_twice(self) -> EvaluateConfig:
        """What is asked twice would count as twice the evidence."""
        for key in ("benchmarks", "jailbreak_paths", "wrappers", "prefill_tokens", "capability"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key} names something twice")
        return self

    @model_validator(mode="after")
    def _engine_can_generate(self) -> EvaluateConfig:
        if self.engine == "vllm":
            gpus = self.gpus_per_worker
            if gpus == 0 or (gpus > 1 and gpus % 1):
                raise ValueError("engine=vllm wants GPUs: gpus_per_worker a share of one, or a whole number")
            if self.adapter is not None:
                raise ValueError("engine=vllm takes no adapter: merge it first, or use engine=transformers")
            if self.temperature and not 0.01 <= self.temperature <= 2:
                raise ValueError("engine=vllm wants a temperature of 0, or from 0.01 to 2")
        return self

    @model_validator(mode="after")
    def _judge_can_judge(self) -> EvaluateConfig:
        """Checked here and not field by field, so that no message quotes a key or a URL with a password."""
        if self.judge == "rubric" and not (self.judge_base_url and self.judge_model):
            raise ValueError("judge=rubric wants judge_base_url and judge_model")
        if not re.fullmatch(r"https?://[^\s@?#]+|", self.judge_base_url or ""):
            raise ValueError(
                "judge_base_url wants http(s)://host[:port]/path, without user, password or query"
            )
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*|", self.judge_api_key_env or ""):
            raise ValueError(
                "judge_api_key_env wants the NAME of an environment variable, in capitals, not the key itself"
            )
        return self
