"""The asyncio client; `sync.py` documents the arguments and errors of its methods."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2

from fidelora.api import Accepted, InferenceRequest, LoraBody, ModelBody, ResultBody, StatusBody
from fidelora.api.explanations import ExplanationBody
from fidelora.api.replay import ReplayAccepted
from fidelora.client import flows
from fidelora.client.calls import Call, Lora, Prompt
from fidelora.client.flows import Answer, Flow, Flows, Result, Run, Step
from fidelora.client.inputs import address
from fidelora.jobs.job import Status
from fidelora.recipe import Recipe


class AsyncClient:
    """Client of the HTTP API of `ai-toolkit-inference`, for asyncio programs.

        async with AsyncClient("http://127.0.0.1:8000") as client:
            result = await client.generate("a [trigger]", "sks.safetensors", trigger_word="sks")
            await client.save_images(result, "pictures")

    The arguments are those of `Client`.
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
            base_url=address(base_url),
            headers=headers,
            timeout=timeout_s,
            transport=transport,
        )
        self._flows = Flows(retries)

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
        match: str | None = None,
        device: str | None = None,
        hf_token: str | None = None,
        idempotency_key: str | None = None,
        **each: Any,
    ) -> Accepted:
        """Queue a request for images and return without waiting for them. See `Client.submit`."""
        fields = {
            "model": model,
            "trigger_word": trigger_word,
            "output_format": output_format,
            "fidelity": fidelity,
            "match": match,
            "device": device,
            "hf_token": hf_token,
        }
        return await self._run(self._flows.submit(prompts, loras, fields, each, idempotency_key))

    async def generate(
        self,
        prompts: Iterable[Prompt] | Prompt | InferenceRequest,
        loras: Iterable[Lora] | Lora = (),
        *,
        timeout_s: float | None = None,
        on_progress: Callable[[StatusBody], None] | None = None,
        **fields: Any,
    ) -> ResultBody:
        """Submit a request and wait for its images. See `Client.generate`."""
        accepted = await self.submit(prompts, loras, **fields)
        return await self._run(
            self._flows.wait_for_success(accepted.request_id, timeout_s, on_progress)
        )

    async def replay(
        self,
        image: str | Path | bytes | Recipe,
        *,
        fidelity: str | None = None,
        device: str | None = None,
        base_model: str | None = None,
        output_format: str | None = None,
        idempotency_key: str | None = None,
    ) -> ReplayAccepted:
        """Queue a request that makes an image again. See `Client.replay`."""
        choices = {
            "fidelity": fidelity,
            "device": device,
            "base_model": base_model,
            "output_format": output_format,
        }
        return await self._run(self._flows.replay(image, choices, idempotency_key))

    async def explain(
        self,
        picture: str | Path | bytes,
        run: str | Path,
        **settings: str | int | float | None,
    ) -> ExplanationBody:
        """Explain why a picture differs from a sample. See `Client.explain`."""
        return await self._run(self._flows.explain(picture, run, settings))

    async def wait(
        self,
        request_id: str,
        *,
        timeout_s: float | None = None,
        on_progress: Callable[[StatusBody], None] | None = None,
        cancel_on_timeout: bool = False,
    ) -> ResultBody:
        """Wait until a request has succeeded, failed or been canceled. See `Client.wait`."""
        return await self._run(
            self._flows.wait(request_id, timeout_s, on_progress, cancel_on_timeout)
        )

    def events(
        self, request_id: str, *, timeout_s: float | None = None, previews: bool = False
    ) -> AsyncIterator[StatusBody]:
        """Yield each new status until the request has ended. See `Client.events`."""
        return self._iterate(Run(self._flows.events(request_id, timeout_s, previews)))

    async def status(self, request_id: str) -> StatusBody:
        """Return the current status of a request."""
        return await self._run(self._flows.status(request_id))

    async def result(self, request_id: str) -> ResultBody:
        """Return the result of a request; it has images once the request succeeded."""
        return await self._run(self._flows.result(request_id))

    async def cancel(self, request_id: str) -> StatusBody:
        """Cancel a request: at once if it is queued, after the current step if it is running."""
        return await self._run(self._flows.cancel(request_id))

    def requests(self, *, status: Status | None = None) -> AsyncIterator[StatusBody]:
        """Yield all requests, newest first; with `status`, only those that have it."""
        return self._iterate(Run(self._flows.requests(status)))

    async def image(self, request_id: str, index: int) -> bytes:
        """Return the bytes of an image file; `index` counts from 0."""
        return await self._run(self._flows.image(request_id, index))

    async def save_images(self, result: ResultBody, folder: str | Path) -> list[Path]:
        """Write all images of a result into a folder. See `Client.save_images`."""
        return await self._run(self._flows.save_images(result, Path(folder)))

    async def models(self) -> list[ModelBody]:
        """Return the model families of the server."""
        return await self._run(self._flows.models())

    def loras(self) -> AsyncIterator[LoraBody]:
        """Yield the LoRAs that requests can use, sorted by path."""
        return self._iterate(Run(self._flows.loras()))

    async def upload_lora(self, path: str | Path, name: str | None = None) -> LoraBody:
        """Upload a LoRA; requests refer to it by the returned `path`."""
        return await self._run(self._flows.upload_lora(Path(path), name))

    async def delete_lora(self, name: str) -> None:
        """Delete an uploaded LoRA."""
        await self._run(self._flows.delete_lora(name))

    async def ready(self) -> bool:
        """True if the server can be reached and has loaded the base model."""
        return await self._run(self._flows.ready())

    async def _run(self, flow: Flow[Result]) -> Result:
        run = Run(flow)
        async for _ in self._iterate(run):
            pass
        return run.result

    async def _iterate(self, run: Run[Any]) -> AsyncIterator[Any]:
        connection, answer = _Connection(self._http), None
        try:
            while (step := run.advance(answer)) is not None:
                if isinstance(step, flows.Item):
                    yield step.value
                    answer = None
                else:
                    answer = await connection.perform(step)
        finally:
            await connection.perform(flows.CloseStream())
            run.close()


class _Connection:
    """Performs the steps of one flow."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http
        self._stream: httpx2.Response | None = None
        self._lines: AsyncIterator[str] | None = None

    async def perform(self, step: Step) -> Answer:
        try:
            match step:
                case Call():
                    return await self._send(step)
                case flows.ReadLine() if self._lines is not None:
                    return await anext(self._lines, None)
                case flows.CloseStream() if self._stream is not None:
                    await self._stream.aclose()
                case flows.Pause():
                    await asyncio.sleep(step.seconds)
        except httpx2.TransportError as error:
            return error
        return None

    async def _send(self, call: Call) -> httpx2.Response:
        response = await self._http.send(call.build(self._http), stream=call.stream)
        if call.stream:
            self._stream, self._lines = response, response.aiter_lines()
            if not response.is_success:
                await response.aread()
        return response
