"""HTTP calls of the client and parsing of their responses, without network I/O."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

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
    UsageError,
)
from fidelora.field_sentences import field_sentence
from fidelora.jobs.job import Status
from fidelora.recipe import Recipe

Lora = str | tuple[str, float] | LoraItem | Mapping[str, Any]
"""A path, a (path, multiplier) tuple, or all fields of a `LoraItem`."""
Prompt = str | PromptItem | Mapping[str, Any]
"""A prompt's text, or all fields of a `PromptItem`."""
Body = TypeVar("Body", bound=BaseModel)

POLL_S = 0.5
"""Seconds between two polls of a server that has no event stream."""
MAX_SILENCE_S = 45.0
"""Read timeout of event streams in seconds: three times the interval of the server's pings."""
_MAX_PAUSE_S = 60.0  # longest wait before a retry, even if Retry-After is longer
_SAFE_ID = re.compile(r"[\w-]{1,64}")
_SUFFIXES = {"png": ".png", "jpeg": ".jpg", "jpg": ".jpg", "webp": ".webp", "mp4": ".mp4"}
_INDEX = re.compile(r"/images/(\d+)$|_output_(\d+)\.\w+$")


@dataclass(frozen=True)
class Call:
    """One HTTP request.

    Attributes:
        repeatable: True if sending it twice has the same effect as sending it once.
        stream: True if the body of a successful response is read line by line.
        timeout_s: seconds that replace the client's timeout; None for no timeout.
    """

    method: str
    path: str
    json: Any = None
    files: Mapping[str, tuple[str, bytes | BinaryIO]] | None = None
    form: Mapping[str, str] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True
    stream: bool = False
    timeout_s: Any = httpx2.USE_CLIENT_DEFAULT

    def build(self, http: httpx2.Client | httpx2.AsyncClient) -> httpx2.Request:
        """Build the request with the defaults of an HTTP client."""
        return http.build_request(
            self.method,
            self.path,
            json=self.json,
            files=self.files,
            data=self.form,
            params=dict(self.params),
            headers=dict(self.headers),
            timeout=self.timeout_s,
        )


def inference_call(request: InferenceRequest, key: str | None) -> Call:
    """Build POST /v1/inference. The idempotency key makes it safe to repeat."""
    body = request.model_dump(mode="json", exclude_none=True)
    if request.hf_token is not None:
        body["hf_token"] = request.hf_token.get_secret_value()
    return Call("POST", "/v1/inference", body, headers={"Idempotency-Key": key or uuid.uuid4().hex})


def replay_call(
    image: Path | bytes | Recipe, choices: Mapping[str, str | None], key: str | None
) -> Call:
    """Build POST /v1/replay. The idempotency key makes it safe to repeat.

    Raises:
        ImageRecordError: the file cannot be read.
    """
    given = {name: value for name, value in choices.items() if value is not None}
    headers = {"Idempotency-Key": key or uuid.uuid4().hex}
    if isinstance(image, Recipe):
        return Call("POST", "/v1/replay", {"recipe": image.to_dict()} | given, headers=headers)
    name, content = (
        ("image", image) if isinstance(image, bytes) else (image.name, _read_file(image))
    )
    return Call("POST", "/v1/replay", files={"image": (name, content)}, form=given, headers=headers)


def explain_call(
    picture: Path | bytes, run: str | Path, settings: Mapping[str, str | int | float | None]
) -> Call:
    """Build POST /v1/explain.

    Args:
        run: path of a zip, or the name of a training run on the server.

    Raises:
        ImageRecordError: the picture cannot be read.
        UsageError: the zip cannot be read.
    """
    name, content = (
        ("picture", picture) if isinstance(picture, bytes) else (picture.name, _read_file(picture))
    )
    files: dict[str, tuple[str, bytes | BinaryIO]] = {"picture": (name, content)}
    form = {key: str(value) for key, value in settings.items() if value is not None}
    if isinstance(run, Path):
        try:
            files["run"] = (run.name, run.read_bytes())
        except OSError as error:
            raise UsageError(f"{run} cannot be read: {error.strerror or error}.") from error
    else:
        form["run_name"] = run
    return Call("POST", "/v1/explain", files=files, form=form, repeatable=False, timeout_s=None)


def _read_file(path: Path) -> bytes:
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
    """Build the body of POST /v1/inference from the arguments of `Client.submit`.

    Args:
        fields: fields of the request itself.
        shared: fields of every prompt that does not set them.

    Raises:
        UsageError: a field is unknown or out of range.
    """
    if isinstance(prompts, str | PromptItem | Mapping):
        prompts = [prompts]
    if isinstance(loras, str | LoraItem | Mapping) or _is_pair(loras):
        loras = [cast(Lora, loras)]
    try:
        request = InferenceRequest(
            prompts=[PromptItem(**(dict(shared) | _prompt_fields(each))) for each in prompts],
            loras=[LoraItem(**_lora_fields(lora)) for lora in cast(Iterable[Lora], loras)],
            **fields,
        )
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        problems = [{"loc": entry["loc"], "msg": field_sentence(entry)} for entry in found]
        raise UsageError(_validation_message(problems)) from error
    unknown = [
        *(request.model_extra or {}),
        *(name for item in request.prompts for name in item.model_extra or {}),
    ]
    if unknown:
        raise UsageError(f"{unknown[0]!r} is not a field of requests; leave it out.")
    return request


def read(response: httpx2.Response, kind: type[Body]) -> Body:
    """Parse the body of a response.

    Raises:
        ApiError: the response is an error, or its body does not belong to this API.
    """
    raise_for(response)
    try:
        return kind.model_validate_json(response.content)
    except ValidationError as error:
        path = response.request.url.path
        raise ApiError(
            f"{path} returned something that is not this API; check base_url.",
            status=response.status_code,
        ) from error


def raise_for(response: httpx2.Response) -> None:
    """Raise `ApiError` with the server's message if the response is an error."""
    if response.is_success:
        return
    status = response.status_code
    kind = ApiUnavailableError if status in (429, 502, 503, 504) else ApiError
    try:
        detail = json.loads(response.content)["detail"]
        if isinstance(detail, list):
            raise ApiError(
                _validation_message(detail),
                status=status,
                code="VALIDATION",
                details={"errors": detail},
            )
        error = detail["error"]
        raise kind(
            str(error["message"]),
            status=status,
            code=str(error["code"]),
            details=dict(error["details"]),
        )
    except (ValueError, TypeError, KeyError) as unreadable:
        raise kind(
            f"{response.request.url.path} returned {status} {response.reason_phrase} without an "
            "error body; check base_url and the server's log.",
            status=status,
        ) from unreadable


def pause_before_retry(
    call: Call, attempts: int, retries: int, response: httpx2.Response | None
) -> float | None:
    """Return the seconds to wait before the next attempt; None if the call must not be retried.

    Args:
        attempts: number of times that the call was sent.
        response: the last response; None if the connection broke.
    """
    if (
        not call.repeatable
        or attempts > retries
        or (response is not None and response.status_code not in (429, 503))
    ):
        return None
    retry_after = response.headers.get("retry-after", "") if response is not None else ""
    backoff_s = float(retry_after) if retry_after.isdigit() else 0.5 * 2 ** (attempts - 1)
    return min(backoff_s, _MAX_PAUSE_S)


def pause_before_stream(
    call: Call, failures: int, retries: int, cause: httpx2.TransportError | None
) -> float:
    """Return the seconds to wait before an event stream is resumed.

    Raises:
        ApiUnavailableError: the stream broke more than `retries` times without a new event.
    """
    pause_s = pause_before_retry(call, failures, retries, None)
    if pause_s is None:
        ended = httpx2.ReadError("the stream of events ended before the request did")
        raise connection_error(call, cause or ended) from cause
    return pause_s


def connection_error(call: Call, error: httpx2.TransportError) -> ApiUnavailableError:
    """Return the error to raise for a broken connection."""
    reason = str(error) or type(error).__name__
    return ApiUnavailableError(
        f"The server did not answer {call.method} {call.path}: {reason}; "
        "check base_url and that the server is running."
    )


class EventReader:
    """Parser for server-sent events that contain the status of a request.

    https://html.spec.whatwg.org/multipage/server-sent-events.html
    """

    def __init__(self) -> None:
        self.last_id = ""
        self._data: list[str] = []

    def feed(self, line: str) -> StatusBody | None:
        """Parse one line; return the status if the line completes an event.

        Raises:
            ApiError: the event is not a status of this API.
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
            raise ApiError(
                "The server sent an event that is not a status of this API; check base_url."
            ) from error


def events_call(request_id: str, last_id: str, previews: bool, timeout_s: float) -> Call:
    """Build the call that opens the event stream, resuming after `last_id` if it is not empty."""
    return Call(
        "GET",
        f"/v1/requests/{request_id}/events",
        params={"previews": "true"} if previews else {},
        headers={"Accept": "text/event-stream"} | ({"Last-Event-ID": last_id} if last_id else {}),
        stream=True,
        timeout_s=timeout_s,
    )


def has_no_events(error: ApiError) -> bool:
    """True if the server has no event stream; only Fidelora adds one to the API."""
    return error.status in (404, 405, 501) and error.code != "REQUEST_NOT_FOUND"


def timeout_error(
    request_id: str, timeout_s: float, status: StatusBody | None
) -> ClientTimeoutError:
    """Return the error to raise when a wait exceeds its timeout."""
    state = "no status was received"
    if status is not None:
        progress = f", {status.progress.fraction:.0%} done" if status.progress else ""
        reason = f" ({status.waiting_reason})" if status.waiting_reason else ""
        state = f"it is {status.status.value}{progress}{reason}"
    return ClientTimeoutError(
        f"Request {request_id} had not ended after {timeout_s:g} seconds: {state}."
    )


def require_success(result: ResultBody, status: StatusBody | None) -> ResultBody:
    """Return the result if the request succeeded.

    Raises:
        RequestFailedError, RequestCanceledError: the request failed or was canceled.
    """
    if result.status is Status.CANCELED:
        raise RequestCanceledError(f"Request {result.request_id} was canceled.")
    if result.status is not Status.SUCCEEDED:
        code = status.error_code if status and status.error_code else ""
        raise RequestFailedError(
            result.error or f"Request {result.request_id} is {result.status.value}.", code=code
        )
    return result


def outputs_of(result: ResultBody) -> dict[int, ImageBody]:
    """Return the images and videos of a result by the index of their prompt.

    Raises:
        UsageError: the request did not succeed.
    """
    if result.outputs is None:
        raise UsageError(f"Request {result.request_id} is {result.status.value} and has no images.")
    found: dict[int, ImageBody] = {}
    for position, body in enumerate((*result.outputs.images, *result.outputs.videos)):
        match = _INDEX.search(body.url) or _INDEX.search(body.file_path)
        found[int(match[1] or match[2]) if match else position] = body
    return dict(sorted(found.items()))


def save_image(folder: Path, result: ResultBody, index: int, content: bytes) -> Path:
    """Check an image's sha256 and write its file.

    Raises:
        OutputError: the content does not have the expected sha256, or cannot be written.
    """
    image = outputs_of(result)[index]
    if image.sha256 and hashlib.sha256(content).hexdigest() != image.sha256:
        raise OutputError(
            f"Image {index} of request {result.request_id} was damaged in transfer and was not "
            "written; download it again."
        )
    # The file name is built from checked parts, so a server cannot choose the path.
    if not _SAFE_ID.fullmatch(result.request_id) or image.format not in _SUFFIXES:
        raise OutputError(
            f"Image {index} was not written: the server sent a request id or format that is not "
            f"valid ({result.request_id[:80]!r}, {image.format[:20]!r})."
        )
    make_folder(folder)
    path = folder / f"{result.request_id}_output_{index}{_SUFFIXES[image.format]}"
    write_atomically(path, content)
    return path


def _prompt_fields(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    return prompt.model_dump(exclude_unset=True) if isinstance(prompt, PromptItem) else dict(prompt)


def _is_pair(value: object) -> bool:
    """Return True for a path and a multiplier, and False for a tuple of LoRAs."""
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], int | float)


def _lora_fields(lora: Lora) -> dict[str, Any]:
    if isinstance(lora, str):
        return {"path": lora}
    if isinstance(lora, tuple):
        if not _is_pair(lora):
            raise UsageError("A LoRA is a path, or a pair of a path and a multiplier.")
        path, multiplier = lora
        return {"path": path, "network_multiplier": multiplier}
    return lora.model_dump(exclude_unset=True) if isinstance(lora, LoraItem) else dict(lora)


def _validation_message(errors: Iterable[Mapping[str, Any]]) -> str:
    """Join validation errors into one line: `prompts.0.width: Expected an integer.`"""
    parts = []
    for error in errors:
        field_path = ".".join(str(part) for part in error.get("loc", ()) if part != "body")
        parts.append(f"{field_path}: {error.get('msg', 'is not valid')}".rstrip("."))
    return "; ".join(parts) + "."
