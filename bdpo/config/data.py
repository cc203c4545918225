"""Section `data`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from bdpo.section import Fraction, Positive, Section


def _is_none(value: object) -> bool:
    """Whether a key is as if it were not there: fingerprints do not hold it."""
    return value is None


def _part(bounds: list[float]) -> list[float]:
    if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1] <= 1:
        raise ValueError(f"expects [low, high] with 0 <= low < high <= 1, not {bounds}")
    return bounds


Quantiles = Annotated[list[float], AfterValidator(_part)]


def _a_column_each(columns: dict[str, str]) -> dict[str, str]:
    for column in columns.values():
        names = [name for name, other in columns.items() if other == column]
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} are the same column {column!r} of the file")
    return columns


Columns = Annotated[dict[str, str], AfterValidator(_a_column_each)]

# A fraction above zero; strict mode would refuse the integer 1.
Weight = Annotated[float, Field(gt=0, le=1, strict=False)]


class SelectConfig(Section):
    """Which of the pairs are trained on: those of one group, and between two quantiles of their own group."""

    group: Literal["safe", "unsafe"] | None = Field(
        None, description="the pairs of this group alone", exclude_if=_is_none
    )

    mi_difference: Quantiles | None = Field(
        None, description="of |I_w - I_l|: [0, 0.5] is the half whose responses are understood alike"
    )
    ches: Quantiles | None = Field(
        None, description="of CHES: [0, 0.95] leaves out the pairs whose responses are most alike"
    )

    @property
    def requires_scores(self) -> bool:
        """Whether the pairs are chosen by their scores."""
        return self.mi_difference is not None or self.ches is not None


class LabelsConfig(Section):
    """Labels of the pairs whose rows have none of their own."""

    group: Literal["safe", "unsafe"] | None = Field(None, description="kind of query")
    chosen_safe: bool | None = Field(None, description="whether the chosen response is safe")
    rejected_safe: bool | None = Field(None, description="whether the rejected response is safe")


class _Reading(Section):
    """How the rows of a data set are read."""

    format: str = Field("auto", description="a format of docs/data.md; auto looks at the first rows")
    name: str | None = Field(
        None, description="configuration of a data set that has several", exclude_if=_is_none
    )
    data_dir: str | None = Field(None, description="folder inside a data set on the hub", exclude_if=_is_none)
    split: str = Field("train", description="of a data set on the hub, or saved with its splits")
    limit: Positive | None = Field(None, description="read at most so many rows of a data set")
    columns: Columns = Field(
        {}, description="name in the format -> name in the file: {prompt: question, chosen: good}"
    )
    labels: LabelsConfig = Field(LabelsConfig(), description="labels of rows that have none of their own")


class SourceConfig(_Reading):
    """One data set of several in `data.path`; what it does not set is as in `data`."""

    path: str = Field(description="as data.path")
    weight: Weight = Field(1.0, description="fraction of its pairs that is kept, drawn with the seed")


class DataConfig(_Reading):
    """Where preference pairs come from and which of them are used."""

    path: str | list[str | SourceConfig] = Field(
        description="file or folder, also on s3:// or gs://; hub name of a data set, or `sandbox`; a list "
        "mixes several"
    )
    sample: dict[Literal["safe", "unsafe"], Positive] | None = Field(
        None, description="keep so many pairs of each group, drawn with the seed"
    )
    max_length: Positive = Field(2048, description="tokens of prompt and response together")
    max_prompt_length: Positive = Field(1024, description="longer prompts are quarantined")
    max_bad_fraction: Fraction = Field(
        0.05, description="more bad rows than this stop the run; rows that are too long do not count"
    )
    select: SelectConfig | None = Field(None, description="train on a part of the pairs, by their scores")

    @model_validator(mode="after")
    def _room_for_a_response(self) -> DataConfig:
        if self.max_prompt_length >= self.max_length:
            raise ValueError("max_prompt_length must be below max_length, to leave room for a response")
        if self.path == []:
            raise ValueError("path is an empty list")
        return self

    def sources(self) -> list[SourceConfig]:
        """The data sets of `path`, each with the keys of this section that it does not set itself."""
        common: dict[str, Any] = {name: getattr(self, name) for name in _Reading.model_fields}
        given = [self.path] if isinstance(self.path, str) else self.path
        entries = [SourceConfig(path=entry) if isinstance(entry, str) else entry for entry in given]
        return [
            SourceConfig(**(common | {name: getattr(entry, name) for name in entry.model_fields_set}))
            for entry in entries
        ]

    @property
    def names(self) -> str:
        """The data sets of `path` as a message names them."""
        return ", ".join(source.path for source in self.sources())
