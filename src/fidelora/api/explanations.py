"""Bodies of `POST /v1/explain`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

ProgramName = Literal["a1111", "forge", "comfyui", "diffusers"]
"""Programs that a request can name if the picture's file does not."""


class ExplainedSample(BaseModel):
    """The trainer's sample that a picture was compared with."""

    step: int
    index: int
    chosen: str = Field(description="How the sample was chosen.")
    base_model: str


class DifferenceBody(BaseModel):
    """A setting that differs from training."""

    cause: str
    theirs: str = Field(description="The setting in the other program, in words.")
    ours: str = Field(description="The setting in training.")
    effect: float | None = Field(
        description="Effect on the pixels in levels (0..255); null if it was not measured."
    )
    in_file: bool = Field(description="True if the picture's file contains the setting.")
    always: bool = Field(
        description="True if the program always does this, whatever its user sets."
    )
    advice: str = Field(description="What to set in the other program; may be empty.")


class NearestThereBody(BaseModel):
    """The sampler of the other program that comes nearest to the sample."""

    sampling: str
    distance: float


class ExplanationBody(BaseModel):
    """Response of `POST /v1/explain`.

    Distances are mean differences in levels (0..255): `distance_before` of the picture from the
    sample, `distance_after` of the picture from the nearest simulated one.
    """

    picture: str
    program: str
    version: str
    has_settings: bool = Field(description="False if the file contains no settings.")
    sample: ExplainedSample
    same: bool = Field(description="True if the picture is the sample, apart from rounding.")
    explained: bool
    distance_before: float
    distance_after: float
    differences: list[DifferenceBody] = Field(description="In descending order of effect.")
    nearest: dict[str, Any] = Field(description="Settings of the nearest simulated picture.")
    nearest_there: NearestThereBody | None
    notes: list[str]
    images: int = Field(
        description="Work, in units of one image with the sample's number of steps."
    )
