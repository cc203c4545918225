"""Section `data`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from bdpo.section import Fraction, Positive, Section


def _part(bounds: list[float]) -> list[float]:
    if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1] <= 1:
        raise ValueError(f"expects [low, high] with 0 <= low < high <= 1, not {bounds}")
    return bounds


Quantiles = Annotated[list[float], AfterValidator(_part)]


class SelectConfig(Section):
    """Which of the scored pairs are trained on: those between two quantiles of their own group."""

    mi_difference: Quantiles | None = Field(
        None, description="of |I_w - I_l|: [0, 0.5] is the half whose responses are understood alike"
    )
    ches: Quantiles | None = Field(
        None, description="of CHES: [0, 0.95] leaves out the pairs whose responses are most alike"
    )


class DataConfig(Section):
    """Where preference pairs come from and which of them are used."""

    path: str = Field(
        description="file or folder, also on s3:// or gs://; hub name of a data set, or `sandbox`"
    )
    format: Literal["auto", "preference", "preference_text", "pku_saferlhf", "hh_rlhf", "sharegpt"] = Field(
        "auto", description="of the columns; `auto` recognises each of the others"
    )
    split: str = Field("train", description="of a data set on the hub, or saved with its splits")
    limit: Positive | None = Field(None, description="read at most so many rows")
    sample: dict[Literal["safe", "unsafe"], Positive] | None = Field(
        None, description="keep so many pairs of each group, drawn with the seed"
    )
    max_length: Positive = Field(2048, description="tokens of prompt and response together")
    max_prompt_length: Positive = Field(1024, description="longer prompts are quarantined")
    max_bad_fraction: Fraction = Field(0.05, description="more quarantined rows than this stop the run")
    select: SelectConfig | None = Field(None, description="train on a part of the pairs, by their scores")

    @model_validator(mode="after")
    def _room_for_a_response(self) -> DataConfig:
        if self.max_prompt_length >= self.max_length:
            raise ValueError("max_prompt_length must be below max_length, to leave room for a response")
        return self
