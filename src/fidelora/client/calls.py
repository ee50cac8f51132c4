"""What a client sends, and what it makes of the answers: everything but the sending."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from fidelora.api import ImageBody, InferenceRequest, LoraItem, PromptItem, ResultBody, StatusBody
from fidelora.atomic import make_folder, write_atomically
from fidelora.errors import (
    ApiError,
    ApiUnavailableError,
    ClientTimeoutError,
    ImageRecordError,
    OutputError,
    RequestCanceledError,
    RequestFailedError,
    WrongUseError,
)
from fidelora.jobs.job import Status
from fidelora.recipe import Recipe

Lora = str | tuple[str, float] | LoraItem | Mapping[str, Any]
"""A path, a path with its multiplier, or all of an item's fields."""
Prompt = str | PromptItem | Mapping[str, Any]
"""A text, or all of an item's fields."""
Body = TypeVar("Body", bound=BaseModel)

POLL_S = 0.5
"""How often a server without events is asked."""
QUIET_S = 45.0
"""How long a stream of events may be silent; ours sends a sign of life every 15 seconds."""
_LONGEST_PAUSE_S = 60.0
_SAFE_ID = re.compile(r"[\w-]{1,64}")
_SUFFIXES = {"png": ".png", "jpeg": ".jpg", "jpg": ".jpg", "webp": ".webp"}


@dataclass(frozen=True)
class Call:
    """One HTTP request; `repeatable` if sending it twice does nothing twice."""

    method: str
    path: str
    json: Any = None
    files: Mapping[str, tuple[str, bytes]] | None = None
    form: Mapping[str, str] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True


def submission(request: InferenceRequest, key: str | None) -> Call:
    """POST /v1/inference; its key makes it safe to send again after a connection broke."""
    body = request.model_dump(mode="json", exclude_none=True)
    if request.hf_token is not None:
        body["hf_token"] = request.hf_token.get_secret_value()
    return Call("POST", "/v1/inference", body, headers={"Idempotency-Key": key or uuid.uuid4().hex})


def replaying(
    image: Path | bytes | Recipe, choices: Mapping[str, str | None], key: str | None
) -> Call:
    """POST /v1/replay; its key makes it safe to send again after a connection broke.

    Raises:
        ImageRecordError: there is no such file.
    """
    given = {name: value for name, value in choices.items() if value is not None}
    headers = {"Idempotency-Key": key or uuid.uuid4().hex}
    if isinstance(image, Recipe):
        return Call("POST", "/v1/replay", {"recipe": image.to_dict()} | given, headers=headers)
    name, content = ("image", image) if isinstance(image, bytes) else (image.name, _content(image))
    return Call("POST", "/v1/replay", files={"image": (name, content)}, form=given, headers=headers)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageRecordError(f"{path} cannot be read: {error.strerror or error}.") from error


def make_request(
    prompts: Iterable[Prompt] | Prompt,
    loras: Iterable[Lora] | Lora,
    fields: Mapping[str, Any],
    shared: Mapping[str, Any],
) -> InferenceRequest:
    """The body that ergonomic arguments mean.

    Args:
        fields: of the request.
        shared: of every prompt that does not have them itself.

    Raises:
        WrongUseError: a field is unknown or out of its range.
    """
    several_prompts = (
        [prompts] if isinstance(prompts, str | PromptItem | Mapping) else list(prompts)
    )
    several_loras = [loras] if isinstance(loras, str | tuple | LoraItem | Mapping) else list(loras)
    try:
        request = InferenceRequest(
            prompts=[PromptItem(**(dict(shared) | _prompt(prompt))) for prompt in several_prompts],
            loras=[LoraItem(**_lora(lora)) for lora in several_loras],
            **fields,
        )
    except ValidationError as error:
        raise WrongUseError(
            _sentence(error.errors(include_url=False, include_input=False))
        ) from error
    unknown = [
        *(request.model_extra or {}),
        *(name for item in request.prompts for name in item.model_extra or {}),
    ]
    if unknown:
        raise WrongUseError(f"A request has no field {unknown[0]!r}.")
    return request


def read(response: httpx2.Response, kind: type[Body]) -> Body:
    """The body of an answer.

    Raises:
        ApiError: it is an error, or nothing that this API answers.
    """
    raise_for(response)
    try:
        return kind.model_validate_json(response.content)
    except ValidationError as error:
        raise ApiError(
            f"The server's answer to {response.request.url.path} is none of this API; is the address right?",
            status=response.status_code,
        ) from error


def raise_for(response: httpx2.Response) -> None:
    """Raise `ApiError` with what the server says, if it says that something is wrong."""
    if response.is_success:
        return
    status = response.status_code
    kind = ApiUnavailableError if status in (429, 502, 503, 504) else ApiError
    try:
        detail = json.loads(response.content)["detail"]
        if isinstance(detail, list):
            raise ApiError(
                _sentence(detail), status=status, code="VALIDATION", details={"errors": detail}
            )
        error = detail["error"]
        raise kind(
            str(error["message"]),
            status=status,
            code=str(error["code"]),
            details=dict(error["details"]),
        )
    except (ValueError, TypeError, KeyError) as unreadable:
        message = f"The server answers {status} {response.reason_phrase} to {response.request.url.path}, and nothing more."
        raise kind(message, status=status) from unreadable


def pause_before_retry(
    call: Call, tried: int, retries: int, response: httpx2.Response | None
) -> float | None:
    """Seconds to wait before a call is sent again; None if it is not.

    Args:
        tried: how often it was sent.
        response: what came; None if the connection broke.
    """
    if (
        not call.repeatable
        or tried > retries
        or (response is not None and response.status_code not in (429, 503))
    ):
        return None
    wanted = response.headers.get("retry-after", "") if response is not None else ""
    return min(float(wanted) if wanted.isdigit() else 0.5 * 2 ** (tried - 1), _LONGEST_PAUSE_S)


def pause_before_stream(
    request_id: str, broken: int, retries: int, cause: httpx2.TransportError | None
) -> float:
    """Seconds to wait before a stream of events that broke is asked for again.

    Raises:
        ApiUnavailableError: it broke too often without anything new.
    """
    call = Call("GET", f"/v1/requests/{request_id}/events")
    pause = pause_before_retry(call, broken, retries, None)
    if pause is None:
        raise unreachable(
            call, cause or httpx2.ReadError("the stream of events ended before the request did")
        ) from cause
    return pause


def unreachable(call: Call, error: httpx2.TransportError) -> ApiUnavailableError:
    """What a broken connection is to the caller."""
    return ApiUnavailableError(
        f"The server did not answer {call.method} {call.path}: {str(error) or type(error).__name__}."
    )


class EventReader:
    """Lines of a stream of server-sent events into statuses: https://html.spec.whatwg.org/multipage/server-sent-events.html."""

    def __init__(self) -> None:
        self.last_id = ""
        self._data: list[str] = []

    def feed(self, line: str) -> StatusBody | None:
        """Take one line; gives the event that it ends, if it ends one.

        Raises:
            ApiError: the event is none of this API.
        """
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "id":
            self.last_id = value
        if line or not self._data:
            return None
        text, self._data = "\n".join(self._data), []
        try:
            return StatusBody.model_validate_json(text)
        except ValidationError as error:
            raise ApiError("The server sent an event that is none of this API.") from error


def stream_of(
    request_id: str, reader: EventReader, previews: bool
) -> tuple[str, dict[str, str], dict[str, str]]:
    """Path, parameters and headers of the stream of events, from where the reader is."""
    headers = {"Accept": "text/event-stream"} | (
        {"Last-Event-ID": reader.last_id} if reader.last_id else {}
    )
    return f"/v1/requests/{request_id}/events", {"previews": "true"} if previews else {}, headers


def has_no_events(error: ApiError) -> bool:
    """Whether a server does not know the stream of events: it has only what the documentation asks for."""
    return error.status in (404, 405, 501) and error.code != "REQUEST_NOT_FOUND"


def late(request_id: str, timeout_s: float, status: StatusBody | None) -> ClientTimeoutError:
    """The error of who waited long enough."""
    where = "nothing was heard of it"
    if status is not None:
        progress = f", {status.progress.fraction:.0%} done" if status.progress else ""
        where = f"it is {status.status.value}{progress}"
    return ClientTimeoutError(
        f"Request {request_id} was not done after {timeout_s:g} seconds: {where}."
    )


def succeeded(result: ResultBody, status: StatusBody | None) -> ResultBody:
    """The result of a request that has to have succeeded.

    Raises:
        RequestFailedError, RequestCanceledError: it has not.
    """
    if result.status is Status.CANCELED:
        raise RequestCanceledError(f"Request {result.request_id} was canceled.")
    if result.status is not Status.SUCCEEDED:
        code = status.error_code if status and status.error_code else ""
        raise RequestFailedError(
            result.error or f"Request {result.request_id} is {result.status.value}.", code=code
        )
    return result


def images_of(result: ResultBody) -> Sequence[ImageBody]:
    """The images of a result.

    Raises:
        WrongUseError: it has none.
    """
    if result.outputs is None:
        raise WrongUseError(
            f"Request {result.request_id} is {result.status.value}: it has no images."
        )
    return result.outputs.images


def save_image(folder: Path, result: ResultBody, index: int, content: bytes) -> Path:
    """Write an image's file, once its bytes are seen to be the ones that were made.

    Raises:
        OutputError: they are not, or cannot be written.
    """
    image = images_of(result)[index]
    if image.sha256 and hashlib.sha256(content).hexdigest() != image.sha256:
        raise OutputError(
            f"Image {index} of request {result.request_id} arrived damaged; nothing was written."
        )
    # Names are made here: what another machine says is no path on this one.
    if not _SAFE_ID.fullmatch(result.request_id) or image.format not in _SUFFIXES:
        raise OutputError(
            f"Image {index} has a request id or format that is none: {result.request_id[:80]!r}, {image.format[:20]!r}."
        )
    make_folder(folder)
    path = folder / f"{result.request_id}_output_{index}{_SUFFIXES[image.format]}"
    write_atomically(path, content)
    return path


def _prompt(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    return prompt.model_dump(exclude_unset=True) if isinstance(prompt, PromptItem) else dict(prompt)


def _lora(lora: Lora) -> dict[str, Any]:
    if isinstance(lora, str):
        return {"path": lora}
    if isinstance(lora, tuple):
        path, multiplier = lora
        return {"path": path, "network_multiplier": multiplier}
    return lora.model_dump(exclude_unset=True) if isinstance(lora, LoraItem) else dict(lora)


def _sentence(errors: Iterable[Mapping[str, Any]]) -> str:
    """What FastAPI says of wrong fields, in one line: `prompts.0.width: Input should be ...`."""
    parts = []
    for error in errors:
        place = ".".join(str(part) for part in error.get("loc", ()) if part != "body")
        parts.append(f"{place}: {error.get('msg', 'is wrong')}")
    return "; ".join(parts).rstrip(".") + "."
