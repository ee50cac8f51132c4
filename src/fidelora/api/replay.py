"""The bodies of `POST /v1/replay`: an image, or what it says of its making, and what the server makes of that."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from fidelora.api.requests import ImageFormat, RequestBody
from fidelora.api.responses import Accepted, accepted
from fidelora.images.parameters import Ignored
from fidelora.jobs.job import Job
from fidelora.recipe import Fidelity


class ReplayChoices(RequestBody):
    """What shall be otherwise than it was; left out, nothing is."""

    output_format: ImageFormat | None = Field(
        None, description="By default that of the image, or png."
    )
    fidelity: Fidelity | None = None
    base_model: Literal["server"] | None = Field(
        None,
        description="`server`: take the server's base model, whatever the image was made with.",
    )


class ReplayRequest(ReplayChoices):
    """The JSON body of `POST /v1/replay`: a recipe as images have it, or the text that AUTOMATIC1111 puts into images."""

    recipe: dict[str, Any] | None = None
    parameters: str | None = Field(None, min_length=1, max_length=50_000)

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if (self.recipe is None) == (self.parameters is None):
            raise ValueError(
                "give either a recipe or parameters; an image is sent as multipart/form-data"
            )
        return self


class IgnoredBody(BaseModel):
    """Something that the image says of its making and that had no part in making it again."""

    name: str
    value: str
    reason: str


class ChangeBody(BaseModel):
    """A field of the recipe that is otherwise than the image says, because the request wants it so."""

    name: str
    was: Any
    now: Any


class ReplayAccepted(Accepted):
    """The answer to `POST /v1/replay`: a request as all others.

    `source` is `fidelora` if the image had a whole recipe, and the same pixels can be expected where nothing was changed; it is
    `a1111` if another program's text was read as far as it goes.
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
    """The answer to a replay that is stored."""
    return ReplayAccepted(
        **accepted(job, base_url).model_dump(),
        source=source,
        recipe=job.recipes[0].to_dict(),
        changes=changes,
        ignored=[IgnoredBody(name=one.name, value=one.value, reason=one.reason) for one in ignored],
        warnings=list(warnings),
    )
