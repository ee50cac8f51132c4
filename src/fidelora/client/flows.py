"""Operations of both clients as generators without network I/O, like `httpx2.Auth.auth_flow`.

A flow yields steps. The client performs each step, sends its answer back into the flow, and
returns the flow's result. A broken connection is sent into the flow as an answer, not thrown.

    step         answer
    Call         the `Response`, whose body is read unless `Call.stream` is set; a
                 `TransportError` if it failed
    ReadLine     the next line of the open stream; None at its end, or a `TransportError`
    CloseStream  None, or a `TransportError`
    Pause        None
    Item         None; the client yields the value to its caller
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import httpx2

from fidelora.api import (
    Accepted,
    InferenceRequest,
    LoraBody,
    LoraList,
    ModelBody,
    ModelList,
    RequestList,
    ResultBody,
    StatusBody,
)
from fidelora.api.explanations import ExplanationBody
from fidelora.api.replay import ReplayAccepted
from fidelora.client import calls
from fidelora.client.calls import Body, Call, Lora, Prompt
from fidelora.client.inputs import open_lora
from fidelora.errors import ApiError, ClientTimeoutError
from fidelora.jobs.job import Status
from fidelora.recipe import Recipe

PAGE_SIZE = 200  # entries per call when listing; the most that the server accepts


@dataclass(frozen=True)
class Pause:
    """Wait for this many seconds."""

    seconds: float


@dataclass(frozen=True)
class ReadLine:
    """Read one line of the stream that a `Call` opened."""


@dataclass(frozen=True)
class CloseStream:
    """Close the stream that a `Call` opened."""


@dataclass(frozen=True)
class Item:
    """Yield a value to the client's caller."""

    value: Any


Page = TypeVar("Page", RequestList, LoraList)
Result = TypeVar("Result")
Step: TypeAlias = Call | Pause | ReadLine | CloseStream | Item
Answer: TypeAlias = httpx2.Response | httpx2.TransportError | str | None
Flow: TypeAlias = Generator[Step, Answer, Result]


class Run(Generic[Result]):
    """A flow in progress. `result` is set once `advance` has returned None."""

    result: Result

    def __init__(self, flow: Flow[Result]) -> None:
        self._flow = flow

    def advance(self, answer: Answer) -> Step | None:
        """Send the answer to the last step, and return the next step; None at the end.

        The first answer is None.
        """
        try:
            return self._flow.send(answer)
        except StopIteration as end:
            self.result = end.value
            return None

    def close(self) -> None:
        """End the flow early and close its open files."""
        self._flow.close()


class Flows:
    """One flow per operation. Calls that can be repeated are retried up to `retries` times."""

    def __init__(self, retries: int) -> None:
        self._retries = retries

    def submit(
        self,
        prompts: Iterable[Prompt] | Prompt | InferenceRequest,
        loras: Iterable[Lora] | Lora,
        fields: Mapping[str, Any],
        shared: Mapping[str, Any],
        key: str | None,
    ) -> Flow[Accepted]:
        if not isinstance(prompts, InferenceRequest):
            prompts = calls.make_request(prompts, loras, fields, shared)
        return self._fetch(calls.inference_call(prompts, key), Accepted)

    def replay(
        self, image: str | Path | bytes | Recipe, choices: Mapping[str, str | None], key: str | None
    ) -> Flow[ReplayAccepted]:
        source = Path(image) if isinstance(image, str) else image
        return self._fetch(calls.replay_call(source, choices, key), ReplayAccepted)

    def explain(
        self,
        picture: str | Path | bytes,
        run: str | Path,
        settings: Mapping[str, str | int | float | None],
    ) -> Flow[ExplanationBody]:
        one = picture if isinstance(picture, bytes) else Path(picture)
        return self._fetch(calls.explain_call(one, run, settings), ExplanationBody)

    def status(self, request_id: str) -> Flow[StatusBody]:
        return self._fetch(Call("GET", f"/v1/requests/{request_id}/status"), StatusBody)

    def result(self, request_id: str) -> Flow[ResultBody]:
        return self._fetch(Call("GET", f"/v1/requests/{request_id}/result"), ResultBody)

    def cancel(self, request_id: str) -> Flow[StatusBody]:
        return self._fetch(Call("DELETE", f"/v1/requests/{request_id}"), StatusBody)

    def requests(self, status: Status | None) -> Flow[None]:
        filters = {"status": status.value} if status is not None else {}
        return self._list("/v1/requests", RequestList, lambda page: page.requests, filters)

    def loras(self) -> Flow[None]:
        return self._list("/v1/loras", LoraList, lambda page: page.loras, {})

    def models(self) -> Flow[list[ModelBody]]:
        return (yield from self._fetch(Call("GET", "/v1/models"), ModelList)).models

    def image(self, request_id: str, index: int) -> Flow[bytes]:
        response = yield from self._send(Call("GET", f"/v1/requests/{request_id}/images/{index}"))
        calls.raise_for(response)
        return response.content

    def save_images(self, result: ResultBody, folder: Path) -> Flow[list[Path]]:
        paths = []
        for index in calls.outputs_of(result):
            content = yield from self.image(result.request_id, index)
            paths.append(calls.save_image(folder, result, index, content))
        return paths

    def upload_lora(self, path: Path, name: str | None) -> Flow[LoraBody]:
        with open_lora(path) as file:
            files = {"file": (name or path.name, file)}
            call = Call("POST", "/v1/loras", files=files, repeatable=False, timeout_s=None)
            response = yield from self._send(call)
        return calls.read(response, LoraBody)

    def delete_lora(self, name: str) -> Flow[None]:
        path = f"/v1/loras/{name.removeprefix('uploads/')}"
        calls.raise_for((yield from self._send(Call("DELETE", path, repeatable=False))))

    def ready(self) -> Flow[bool]:
        answer = yield Call("GET", "/ready")  # not retried: a failure means not ready
        return isinstance(answer, httpx2.Response) and answer.is_success

    def wait_for_success(
        self,
        request_id: str,
        timeout_s: float | None,
        on_progress: Callable[[StatusBody], None] | None,
    ) -> Flow[ResultBody]:
        status = yield from self._last_status(request_id, timeout_s, on_progress, True)
        return calls.require_success((yield from self.result(request_id)), status)

    def wait(
        self,
        request_id: str,
        timeout_s: float | None,
        on_progress: Callable[[StatusBody], None] | None,
        cancel_on_timeout: bool,
    ) -> Flow[ResultBody]:
        yield from self._last_status(request_id, timeout_s, on_progress, cancel_on_timeout)
        return (yield from self.result(request_id))

    def events(
        self, request_id: str, timeout_s: float | None, previews: bool = False
    ) -> Flow[None]:
        """Yield each new status as an item: from the stream of events, else by polling."""
        deadline = time.monotonic() + timeout_s if timeout_s is not None else None
        status: StatusBody | None = None
        reader, failures, has_stream = calls.EventReader(), 0, True
        while status is None or not status.status.final:
            left = calls.MAX_SILENCE_S
            if deadline is not None:
                left = min(left, deadline - time.monotonic())
            if timeout_s is not None and left <= 0:
                raise calls.timeout_error(request_id, timeout_s, status)
            if not has_stream:
                if (new := (yield from self.status(request_id))) != status:
                    status = new
                    yield Item(status)
                if not status.status.final:
                    yield Pause(min(calls.POLL_S, left))
                continue
            call = calls.events_call(request_id, reader.last_id, previews, left)
            answer = yield call
            if isinstance(answer, httpx2.Response):
                try:
                    calls.raise_for(answer)
                except ApiError as error:
                    if not calls.has_no_events(error):
                        raise
                    has_stream = False
                while has_stream and isinstance(answer := (yield ReadLine()), str):
                    if (event := reader.feed(answer)) is not None:
                        status, failures = event, 0
                        yield Item(status)
                        if status.status.final:
                            break
                    if deadline is not None and time.monotonic() > deadline:
                        break
            answer = (yield CloseStream()) or answer
            if not has_stream or (status is not None and status.status.final):
                continue
            if deadline is not None and time.monotonic() >= deadline:
                continue
            # The server may end the stream early, for example when it stops. Resume it then, as
            # after a broken connection.
            failures += 1
            cause = answer if isinstance(answer, httpx2.TransportError) else None
            yield Pause(calls.pause_before_stream(call, failures, self._retries, cause))

    def _last_status(
        self,
        request_id: str,
        timeout_s: float | None,
        on_progress: Callable[[StatusBody], None] | None,
        cancel_on_timeout: bool,
    ) -> Flow[StatusBody | None]:
        status, answer = None, None
        events = Run(self.events(request_id, timeout_s))
        try:
            while (step := events.advance(answer)) is not None:
                if not isinstance(step, Item):
                    answer = yield step
                    continue
                status, answer = step.value, None
                if on_progress is not None:
                    on_progress(status)
        except ClientTimeoutError:
            if cancel_on_timeout:
                yield from self.cancel(request_id)
            raise
        return status

    def _list(
        self,
        path: str,
        kind: type[Page],
        entries_of: Callable[[Page], list[Any]],
        filters: Mapping[str, str],
    ) -> Flow[None]:
        params = {**filters, "limit": PAGE_SIZE}
        while True:
            page = yield from self._fetch(Call("GET", path, params=params), kind)
            for entry in entries_of(page):
                yield Item(entry)
            if page.next_cursor is None:
                return
            params = {**params, "cursor": page.next_cursor}

    def _fetch(self, call: Call, kind: type[Body]) -> Flow[Body]:
        return calls.read((yield from self._send(call)), kind)

    def _send(self, call: Call) -> Flow[httpx2.Response]:
        attempts = 0
        while True:
            attempts += 1
            answer = yield call
            response = answer if isinstance(answer, httpx2.Response) else None
            pause_s = calls.pause_before_retry(call, attempts, self._retries, response)
            if pause_s is not None:
                yield Pause(pause_s)
            elif isinstance(answer, httpx2.TransportError):
                raise calls.connection_error(call, answer) from answer
            else:
                assert response is not None
                return response
