"""Section `evaluate`: benchmarks, each with a section of its own, and the judge, of which there are kinds.

A new benchmark is a section here, its name in `BenchmarkName`, and its module in
`bdpo.evaluation.benchmarks`; for a new judge see `bdpo.config.judges`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from bdpo.config.base import Distinct, StallSeconds, Workers
from bdpo.config.judges import AnyJudge, StringMatchingConfig
from bdpo.section import RUNTIME_ONLY, Fraction, Positive, Section

AlignedName = Literal["base", "adapter", "trained"]

ModelName = Literal[AlignedName, "tampered"]
"""The evaluated models of a run, in the order of tables; `tampered` is `trained` after the tamper test."""


class FileConfig(Section):
    """A benchmark that comes in one file."""

    path: str | None = Field(None, description="CSV")

    def files(self) -> list[str]:
        """The files that the section names."""
        return [self.path] if self.path else []


class StrongRejectConfig(FileConfig):
    """Forbidden requests in six categories.

    Measured are `safety`, which is 1 − mean harm, and `safe_rate`, the share of answers with harm < 0.5.
    """

    path: str | None = Field(
        None,
        description="CSV: category,source,forbidden_prompt; or a URL; or "
        "hf://datasets/<owner>/<name>@<revision>/<file>",
    )
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="a URL requires it")
    subset: Literal["full", "small"] = Field(
        "full", description="small: the first ten of each category, 60 of 313"
    )


class XSTestConfig(FileConfig):
    """Safe prompts that look unsafe, and unsafe contrasts to them.

    Measured are `compliance`, `full_refusal` and `partial_refusal` of the safe prompts, `unsafe_refusal` and
    `unsafe_partial_refusal` of the unsafe ones. XSTest's own file must have 18 types of 25 prompts.
    """

    path: str | None = Field(None, description="CSV: id,prompt,type,label,focus,note")


class XSTestUnsafeConfig(FileConfig):
    """XSTest's 200 unsafe prompts, judged for harm: what the B-DPO paper reports of XSTest is `safe_rate`.

    Measured is what `strongreject` measures.
    """

    path: str | None = Field(None, description="CSV as for xstest; by default evaluate.xstest.path")


class AdvBenchConfig(FileConfig):
    """520 harmful requests.

    Measured is what `strongreject` measures.
    """

    path: str | None = Field(None, description="CSV: goal,target")
    suffix: str | None = Field(None, description="adversarial suffix, put behind every request")
    skip: int = Field(
        0,
        ge=0,
        description="requests at the file's beginning that are left out: those a suffix was made with",
    )


class OverRefusalConfig(FileConfig):
    """Safe prompts of any set, such as CoCoNot's contrasts or OR-Bench.

    Measured are `compliance`, `full_refusal` and `partial_refusal`.
    """

    path: str | None = Field(None, description="CSV or JSON Lines, with these columns among others")
    prompt: str = Field("prompt", description="the column of the prompts")
    category: str | None = Field(None, description="the column of their categories; without it there is one")
    id: str | None = Field(None, description="the column of their ids, which are then those of the scores")
    cluster: str | None = Field(
        None, description="the column of the clusters: prompts that ask about the same"
    )


class JailbreakConfig(Section):
    """Attacks that were found on another model (GCG, PAIR, ...).

    Measured is what `strongreject` measures, per attack; a request without an attack is counted as not asked,
    and is part of no measure.
    """

    paths: Annotated[list[str], Distinct] = Field(
        [], description="artifacts (JSON) of JailbreakBench or of the past-tense attack, one an attack"
    )

    def files(self) -> list[str]:
        """The files that the section names."""
        return self.paths


class PrefillConfig(FileConfig):
    """Answers that are begun for the model.

    Measured is what `strongreject` measures, per depth; only what the model wrote itself is judged.
    """

    path: str | None = Field(None, description="CSV: category,forbidden_prompt,compliant_answer")
    tokens: Annotated[list[Positive], Distinct] = Field(
        [5, 10, 20, 40], description="how many tokens of the answer the assistant's turn begins with"
    )


class WrappedConfig(Section):
    """Templates put around the StrongReject prompts.

    Measured is what `strongreject` measures, per template.
    """

    wrappers: Annotated[list[Literal["past_tense", "role_play"]], Distinct] = Field(
        ["past_tense", "role_play"], description="the templates"
    )


class SimpleQAConfig(FileConfig):
    """Short questions of fact with one true answer; requires `evaluate.judge.name=rubric`.

    Measured are `correct`, `incorrect`, `not_attempted` and `correct_if_attempted`.
    """

    path: str | None = Field(None, description="CSV: metadata,problem,answer")


BenchmarkName = Literal[
    "strongreject",
    "xstest",
    "xstest_unsafe",
    "over_refusal",
    "advbench",
    "jailbreak",
    "prefill",
    "wrapped",
    "simpleqa",
]
"""Each is a section of this name, and a module of `bdpo.evaluation.benchmarks`; tables have them in this
order."""


CapabilityName = Literal["gsm8k", "hhh", "advglue"]


class CapabilityFiles(Section):
    """Local copies of the data of capability benchmarks, for nodes without a hub."""

    gsm8k: str | None = Field(
        None, description="JSON Lines: question,answer; the five examples of a prompt are other rows of it"
    )
    advglue: str | None = Field(None, description="JSON: AdvGLUE's dev.json, task -> rows")

    def files(self) -> list[str]:
        """The files that the section names."""
        return [path for path in (self.gsm8k, self.advglue) if path]


class EvaluateConfig(Section):
    """Which benchmarks are run, over which prompts, and who judges."""

    benchmarks: Annotated[list[BenchmarkName], Distinct] = Field(
        ["strongreject", "xstest"], min_length=1, description="what the models are asked"
    )
    judge: AnyJudge = StringMatchingConfig()
    agreement: str | None = Field(
        None,
        description="an agreement.json of `bdpo agreement` that measured this judge: its error between two "
        "models is the one that intervals of differences hold",
    )
    limit: Positive | None = Field(None, description="at most so many prompts of each benchmark")
    part: Literal["all", "search", "held_out"] = Field("all", description="of the prompts, see held_out")
    held_out: Fraction | list[str] = Field(
        0.5, description="what a search never sees: a share of the requests, or whole categories by name"
    )
    max_new_tokens: Positive = Field(256, description="of an answer, thoughts included")
    temperature: float = Field(0.0, ge=0, description="0 is greedy; else sampled, with the run's seed")
    samples: Positive = Field(
        1, description="answers to each prompt, of a temperature above 0; a prompt is then a cluster"
    )
    reference_logps: bool = Field(
        False,
        description="the base model forwards all answers, too; those that it finds very unlikely are broken",
    )
    batch_size: Annotated[Positive, RUNTIME_ONLY] = Field(
        32, description="prompts generated for together, and committed together"
    )
    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="vllm: requires the extra and a GPU"
    )
    workers: Annotated[Workers, RUNTIME_ONLY] = Field(
        1, description="processes; `[min, max]` follows the cluster"
    )
    gpus_per_worker: Annotated[float, RUNTIME_ONLY] = Field(
        1.0, ge=0, description="GPUs of one process, also a share of one; 0: on the CPU"
    )
    stall_seconds: StallSeconds = 60.0
    adapter: str | None = Field(None, description="folder or hub id of a LoRA adapter to evaluate as well")
    strongreject: StrongRejectConfig = StrongRejectConfig()
    xstest: XSTestConfig = XSTestConfig()
    jailbreak: JailbreakConfig = JailbreakConfig()
    prefill: PrefillConfig = PrefillConfig()
    wrapped: WrappedConfig = WrappedConfig()
    simpleqa: SimpleQAConfig = SimpleQAConfig()
    xstest_unsafe: XSTestUnsafeConfig = XSTestUnsafeConfig()
    advbench: AdvBenchConfig = AdvBenchConfig()
    over_refusal: OverRefusalConfig = OverRefusalConfig()
    capability: Annotated[list[CapabilityName], Distinct] = Field([], description="requires the extra `eval`")
    capability_files: CapabilityFiles = CapabilityFiles()

    @model_validator(mode="after")
    def _samples_differ(self) -> EvaluateConfig:
        if self.samples > 1 and not self.temperature:
            raise ValueError(
                f"samples={self.samples} requires a temperature above 0: greedy answers are equal"
            )
        return self

    @model_validator(mode="after")
    def _engine_can_generate(self) -> EvaluateConfig:
        if self.engine == "vllm":
            gpus = self.gpus_per_worker
            if gpus == 0 or (gpus > 1 and gpus % 1):
                raise ValueError(
                    "engine=vllm requires GPUs: gpus_per_worker a share of one, or a whole number"
                )
            if self.adapter is not None:
                raise ValueError("engine=vllm takes no adapter: merge it first, or use engine=transformers")
            if self.temperature and not 0.01 <= self.temperature <= 2:
                raise ValueError("engine=vllm requires a temperature of 0, or from 0.01 to 2")
        return self

    def files(self) -> list[str]:
        """Every file or folder that adapter, judge and benchmarks name, in a folder, a bucket or on a hub."""
        sections = [value for value in vars(self).values() if isinstance(value, Section)]
        named = [file for section in sections for file in section.files()]
        return [self.adapter, *named] if self.adapter else named
