"""The client of asynchronous programs; `sync.py` with coroutines in place of functions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

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
from fidelora.api.replay import ReplayAccepted
from fidelora.client import calls
from fidelora.client.calls import Call, Lora, Prompt
from fidelora.errors import ApiError, ClientTimeoutError
from fidelora.jobs.job import Status
from fidelora.recipe import Recipe


class AsyncClient:
    """A server of the documented HTTP API, ours or another.

        async with AsyncClient("http://127.0.0.1:8000") as client:
            result = await client.generate("[trigger] on grass", "sks.safetensors", trigger_word="sks", seed=7)
            await client.save_images(result, "pictures")

    Args:
        base_url: where the server is; behind a proxy with the path that leads to it.
        api_key: one that `fidelora keys add` made, if the server has any.
        timeout_s: for the answer to one call; not for making images.
        retries: how often a call is sent again if the connection breaks or the server has no time; nothing is done twice by that.
        transport: another way to the server; for tests.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retries: int = 3,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx2.AsyncClient(
            base_url=base_url.rstrip("/"), headers=headers, timeout=timeout_s, transport=transport
        )
        self._retries = retries

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def submit(
        self,
        prompts: Iterable[Prompt] | Prompt | InferenceRequest,
        loras: Iterable[Lora] | Lora = (),
        *,
        model: str = "sd15",
        trigger_word: str | None = None,
        output_format: str = "png",
        fidelity: str | None = None,
        hf_token: str | None = None,
        idempotency_key: str | None = None,
        **each: Any,
    ) -> Accepted:
        """Ask for images; they are made while nobody waits.

        Args:
            prompts: one image each; or a whole request, to which nothing else is added.
            loras: in order; a path, (path, multiplier), or all fields.
            fidelity: `exact` or `fast`; by default what the server is set to.
            idempotency_key: under the same key the same request is made once only.
            each: fields for every prompt that does not have them: `width`, `height`, `seed`, `neg`, `sampler`, `sample_steps`, ...

        Raises:
            WrongUseError: a field is unknown or out of its range.
            ApiError: the server refuses it, with its code; `ApiUnavailableError` if it may take it later.
        """
        if not isinstance(prompts, InferenceRequest):
            fields = {
                "model": model,
                "trigger_word": trigger_word,
                "output_format": output_format,
                "fidelity": fidelity,
                "hf_token": hf_token,
            }
            prompts = calls.make_request(prompts, loras, fields, each)
        return calls.read(await self._call(calls.submission(prompts, idempotency_key)), Accepted)

    async def generate(
        self,
        prompts: Iterable[Prompt] | Prompt | InferenceRequest,
        loras: Iterable[Lora] | Lora = (),
        *,
        timeout_s: float | None = None,
        on_progress: Callable[[StatusBody], None] | None = None,
        **fields: Any,
    ) -> ResultBody:
        """`submit`, and `wait` for the images.

        Raises:
            RequestFailedError, RequestCanceledError: there are none.
            FideloraError: as `submit` and `wait`.
        """
        accepted = await self.submit(prompts, loras, **fields)
        status = await self._last_status(accepted.request_id, timeout_s, on_progress, True)
        return calls.succeeded(await self.result(accepted.request_id), status)

    async def replay(
        self,
        image: str | Path | bytes | Recipe,
        *,
        fidelity: str | None = None,
        base_model: str | None = None,
        output_format: str | None = None,
        idempotency_key: str | None = None,
    ) -> ReplayAccepted:
        """Have an image made again from what its file says; `wait` for it as for others.

        Args:
            image: a file, its bytes, or a recipe.
            fidelity: `exact` or `fast`, in place of the recipe's.
            base_model: `server` takes the server's base model, whatever the image was made with.
            output_format: by default that of the image.
            idempotency_key: under the same key the same image is made once only.

        Raises:
            ApiError: `LORA_BYTES_MISSING`, `BASE_MODEL_DIFFERS` or `IMAGE_WITHOUT_RECIPE` say why it cannot be.
            ImageRecordError: the file cannot be read.
        """
        choices = {"fidelity": fidelity, "base_model": base_model, "output_format": output_format}
        call = calls.replaying(
            Path(image) if isinstance(image, str) else image, choices, idempotency_key
        )
        return calls.read(await self._call(call), ReplayAccepted)

    async def wait(
        self,
        request_id: str,
        *,
        timeout_s: float | None = None,
        on_progress: Callable[[StatusBody], None] | None = None,
        cancel_on_timeout: bool = False,
    ) -> ResultBody:
        """Wait until a request has ended, in whatever way.

        Args:
            on_progress: called with every status that is new.

        Raises:
            ClientTimeoutError: it took longer than `timeout_s`; it goes on at the server unless `cancel_on_timeout`.
        """
        await self._last_status(request_id, timeout_s, on_progress, cancel_on_timeout)
        return await self.result(request_id)

    async def events(
        self, request_id: str, *, timeout_s: float | None = None, previews: bool = False
    ) -> AsyncIterator[StatusBody]:
        """Every status that is new, until the request has ended. A server without events is asked again and again.

        Args:
            previews: whether statuses carry a rough picture (`preview`, a JPEG in base64), where the server has that.

        Raises:
            ClientTimeoutError: it took longer than `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s if timeout_s is not None else None
        status: StatusBody | None = None
        reader, broken, streams = calls.EventReader(), 0, True
        while status is None or not status.status.final:
            left = (
                calls.QUIET_S
                if deadline is None
                else min(calls.QUIET_S, deadline - time.monotonic())
            )
            if timeout_s is not None and left <= 0:
                raise calls.late(request_id, timeout_s, status)
            if not streams:
                if (new := await self.status(request_id)) != status:
                    status = new
                    yield status
                if not status.status.final:
                    await asyncio.sleep(min(calls.POLL_S, left))
                continue
            cause: httpx2.TransportError | None = None
            try:
                async for new in self._stream(request_id, reader, left, deadline, previews):
                    status, broken = new, 0
                    yield status
                    if status.status.final:
                        return
            except ApiError as error:
                if not calls.has_no_events(error):
                    raise
                streams = False
                continue
            except httpx2.TransportError as error:
                cause = error
            if deadline is not None and time.monotonic() >= deadline:
                continue
            broken += (
                1  # or ended by a server that stops; either way it is asked again for what is new
            )
            await asyncio.sleep(calls.pause_before_stream(request_id, broken, self._retries, cause))

    async def status(self, request_id: str) -> StatusBody:
        """Where a request is."""
        return calls.read(
            await self._call(Call("GET", f"/v1/requests/{request_id}/status")), StatusBody
        )

    async def result(self, request_id: str) -> ResultBody:
        """What a request made, if it is done."""
        return calls.read(
            await self._call(Call("GET", f"/v1/requests/{request_id}/result")), ResultBody
        )

    async def cancel(self, request_id: str) -> StatusBody:
        """Stop a request: a waiting one at once, a running one after its step."""
        return calls.read(
            await self._call(Call("DELETE", f"/v1/requests/{request_id}")), StatusBody
        )

    async def requests(self, *, status: Status | None = None) -> AsyncIterator[StatusBody]:
        """All requests, newest first."""
        cursor = None
        while True:
            params = {"status": status.value if status else None, "cursor": cursor, "limit": 200}
            given = {name: value for name, value in params.items() if value is not None}
            page = calls.read(
                await self._call(Call("GET", "/v1/requests", params=given)), RequestList
            )
            for entry in page.requests:
                yield entry
            if (cursor := page.next_cursor) is None:
                return

    async def image(self, request_id: str, index: int) -> bytes:
        """An image's file."""
        response = await self._call(Call("GET", f"/v1/requests/{request_id}/images/{index}"))
        calls.raise_for(response)
        return response.content

    async def save_images(self, result: ResultBody, folder: str | Path) -> list[Path]:
        """Write all images of a result into a folder, each one whole or not at all.

        Raises:
            WrongUseError: the result has no images.
            OutputError: one arrived damaged, or cannot be written.
        """
        count = len(calls.images_of(result))
        return [
            calls.save_image(
                Path(folder), result, index, await self.image(result.request_id, index)
            )
            for index in range(count)
        ]

    async def models(self) -> list[ModelBody]:
        """The model families of the server."""
        return calls.read(await self._call(Call("GET", "/v1/models")), ModelList).models

    async def loras(self) -> AsyncIterator[LoraBody]:
        """The LoRAs that requests can name, by path."""
        cursor = None
        while True:
            params = {"limit": 200} | ({"cursor": cursor} if cursor is not None else {})
            page = calls.read(await self._call(Call("GET", "/v1/loras", params=params)), LoraList)
            for entry in page.loras:
                yield entry
            if (cursor := page.next_cursor) is None:
                return

    async def upload_lora(self, path: str | Path, name: str | None = None) -> LoraBody:
        """Give the server a LoRA; requests name it by the `path` of the answer."""
        path = Path(path)
        with path.open("rb") as file:
            try:
                response = await self._http.post(
                    "/v1/loras", files={"file": (name or path.name, file)}, timeout=None
                )
            except httpx2.TransportError as error:
                raise calls.unreachable(Call("POST", "/v1/loras"), error) from error
        return calls.read(response, LoraBody)

    async def delete_lora(self, name: str) -> None:
        """Delete a LoRA that was uploaded."""
        calls.raise_for(
            await self._call(
                Call("DELETE", f"/v1/loras/{name.removeprefix('uploads/')}", repeatable=False)
            )
        )

    async def ready(self) -> bool:
        """Whether the server can be reached and makes images now."""
        try:
            return (await self._http.get("/ready")).is_success
        except httpx2.TransportError:
            return False

    async def _last_status(
        self,
        request_id: str,
        timeout_s: float | None,
        on_progress: Callable[[StatusBody], None] | None,
        cancel_on_timeout: bool,
    ) -> StatusBody | None:
        status = None
        try:
            async for status in self.events(request_id, timeout_s=timeout_s):
                if on_progress is not None:
                    on_progress(status)
        except ClientTimeoutError:
            if cancel_on_timeout:
                await self.cancel(request_id)
            raise
        return status

    async def _stream(
        self,
        request_id: str,
        reader: calls.EventReader,
        quiet_s: float,
        deadline: float | None,
        previews: bool,
    ) -> AsyncIterator[StatusBody]:
        path, params, headers = calls.stream_of(request_id, reader, previews)
        async with self._http.stream(
            "GET", path, params=params, headers=headers, timeout=quiet_s
        ) as response:
            if not response.is_success:
                await response.aread()
                calls.raise_for(response)
            async for line in response.aiter_lines():
                if (status := reader.feed(line)) is not None:
                    yield status
                if deadline is not None and time.monotonic() > deadline:
                    return

    async def _call(self, call: Call) -> httpx2.Response:
        tried = 0
        while True:
            tried += 1
            response, broken = None, None
            try:
                response = await self._http.request(
                    call.method,
                    call.path,
                    json=call.json,
                    files=call.files,
                    data=call.form,
                    params=dict(call.params),
                    headers=dict(call.headers),
                )
            except httpx2.TransportError as error:
                broken = error
            pause = calls.pause_before_retry(call, tried, self._retries, response)
            if pause is None:
                if broken is not None:
                    raise calls.unreachable(call, broken) from broken
                assert response is not None
                return response
            await asyncio.sleep(pause)
