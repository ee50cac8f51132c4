"""Bodies of `POST /v1/replay`: an image or its recipe, and the queued request."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from fidelora.api.requests import ABOUT_DEVICE, DeviceKind, OutputFormat, RequestBody
from fidelora.api.responses import Accepted, accepted
from fidelora.images.parameter_pairs import Ignored
from fidelora.jobs.job import Job
from fidelora.recipe import Fidelity


class ReplayChoices(RequestBody):
    """Changes to the recipe; omitted fields change nothing."""

    output_format: OutputFormat | None = Field(
        None,
        description="By default the image's format. If no image is sent, png, or mp4 for a video.",
    )
    fidelity: Fidelity | None = None
    device: DeviceKind | None = Field(
        None, description="Kind of device that makes the image; by default any. " + ABOUT_DEVICE
    )
    emphasis: bool | None = Field(
        None,
        description="True: weight words in brackets, in images of AUTOMATIC1111's web UI.",
    )
    base_model: Literal["server"] | None = Field(
        None,
        description="`server`: use the server's base model, even if the image used another one.",
    )


class ReplayRequest(ReplayChoices):
    """JSON body of `POST /v1/replay`: a recipe, or the parameters text of AUTOMATIC1111."""

    recipe: dict[str, Any] | None = None
    parameters: str | None = Field(None, min_length=1, max_length=50_000)

    @model_validator(mode="after")
    def _require_one_source(self) -> Self:
        if (self.recipe is None) == (self.parameters is None):
            raise ValueError(
                "give either a recipe or parameters; send an image as multipart/form-data"
            )
        return self


class IgnoredBody(BaseModel):
    """A parameter of the image that the replay does not use."""

    name: str
    value: str
    reason: str


class ChangeBody(BaseModel):
    """A field of the recipe that the request changed."""

    name: str
    was: Any
    now: Any


class ReplayAccepted(Accepted):
    """Response of `POST /v1/replay`: a queued request.

    `source` is `fidelora` if the request has a complete recipe; the new image then has the same
    pixels if `changes` is empty. `source` is `a1111` if the recipe was built from the supported
    part of another program's parameters text.
    """

    source: Literal["fidelora", "a1111"]
    recipe: dict[str, Any]
    changes: list[ChangeBody]
    ignored: list[IgnoredBody]
    warnings: list[str]


def replay_accepted(
    job: Job,
    base_url: str,
    source: Literal["fidelora", "a1111"],
    *,
    changes: list[ChangeBody],
    ignored: tuple[Ignored, ...] = (),
    warnings: tuple[str, ...] = (),
) -> ReplayAccepted:
    """Return the response for a queued replay."""
    return ReplayAccepted(
        **accepted(job, base_url).model_dump(),
        source=source,
        recipe=job.recipes[0].to_dict(),
        changes=changes,
        ignored=[IgnoredBody(name=one.name, value=one.value, reason=one.reason) for one in ignored],
        warnings=list(warnings),
    )
