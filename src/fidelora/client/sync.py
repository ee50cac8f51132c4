"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
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


class Client:
    """Client of the HTTP API of `ai-toolkit-inference`, for Fidelora's server and others.

        with Client("http://127.0.0.1:8000") as client:
            result = client.generate("a [trigger]", "sks.safetensors", trigger_word="sks", seed=7)
            client.save_images(result, "pictures")

    Args:
        base_url: address of the server, with the path prefix if it is behind a proxy.
        api_key: a key made by `fidelora keys add`, if the server requires keys.
        timeout_s: seconds to wait for the response to one call; generation may take longer.
        retries: number of times that a call is sent again if the connection breaks or the server
            is busy. Idempotency keys ensure that a retry does not queue a second request.
        transport: another `httpx2` transport, for tests.

    Raises:
        UsageError: `base_url` does not begin with http:// or https://.

    Every method that calls the server raises `ApiUnavailableError` if the server cannot be reached
    or is too busy, and `ApiError` if it returns another error. The `Raises` sections below list
    further errors, and the codes of some `ApiError`s.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retries: int = 3,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx2.Client(
            base_url=address(base_url),
            headers=headers,
            timeout=timeout_s,
            transport=transport,
        )
        self._flows = Flows(retries)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def submit(
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
        """Queue a request for images and return without waiting for them.

        Args:
            prompts: one prompt per image; or a complete request, which replaces the other fields.
            loras: the LoRAs in order, each a path, a (path, multiplier) tuple, or all its fields.
            fidelity: `exact` or `fast`; by default the server's setting.
            match: `trainer` for the sizes and the default number of steps of AI Toolkit's samples,
                instead of the server's.
            device: `cpu`, `cuda` or `mps`: only a worker with such a device makes the images.
            idempotency_key: a repeated call with the same key returns the same request.
            each: fields for every prompt that does not set them: `width`, `height`, `seed`, `neg`,
                `sampler`, `sample_steps`, ...

        Raises:
            UsageError: a field is unknown or out of range.
            ApiError: the server rejected the request; the error has the server's code.
            ApiUnavailableError: the server cannot be reached, or is too busy to accept the request.
        """
        fields = {
            "model": model,
            "trigger_word": trigger_word,
            "output_format": output_format,
            "fidelity": fidelity,
            "match": match,
            "device": device,
            "hf_token": hf_token,
        }
        return self._run(self._flows.submit(prompts, loras, fields, each, idempotency_key))

    def generate(
        self,
        prompts: Iterable[Prompt] | Prompt | InferenceRequest,
        loras: Iterable[Lora] | Lora = (),
        *,
        timeout_s: float | None = None,
        on_progress: Callable[[StatusBody], None] | None = None,
        **fields: Any,
    ) -> ResultBody:
        """Submit a request and wait for its images. A request that times out is canceled.

        Takes the arguments of `submit`, and `timeout_s` and `on_progress` of `wait`.

        Raises:
            RequestFailedError, RequestCanceledError: the request ended without images.
            FideloraError: as for `submit` and `wait`.
        """
        accepted = self.submit(prompts, loras, **fields)
        return self._run(self._flows.wait_for_success(accepted.request_id, timeout_s, on_progress))

    def replay(
        self,
        image: str | Path | bytes | Recipe,
        *,
        fidelity: str | None = None,
        device: str | None = None,
        base_model: str | None = None,
        output_format: str | None = None,
        idempotency_key: str | None = None,
    ) -> ReplayAccepted:
        """Queue a request that makes an image again from its embedded recipe.

        Pass its `request_id` to `wait`.

        Args:
            image: an image's path, its bytes, or a recipe.
            fidelity: `exact` or `fast`, instead of the recipe's.
            device: `cpu`, `cuda` or `mps`: only a worker with such a device makes the image.
            base_model: `server` for the server's base model, even if the image used another one.
            output_format: by default the format of the image.
            idempotency_key: a repeated call with the same key returns the same request.

        Raises:
            ApiError: the image cannot be replayed: `LORA_BYTES_MISSING`, `BASE_MODEL_DIFFERS` or
                `IMAGE_WITHOUT_RECIPE`.
            ImageRecordError: the file cannot be read.
        """
        choices = {
            "fidelity": fidelity,
            "device": device,
            "base_model": base_model,
            "output_format": output_format,
        }
        return self._run(self._flows.replay(image, choices, idempotency_key))

    def explain(
        self,
        picture: str | Path | bytes,
        run: str | Path,
        **settings: str | int | float | None,
    ) -> ExplanationBody:
        """Explain why a picture of another program differs from a sample of a training run.

        Takes about the time of 10 to 40 images.

        Args:
            picture: the picture's path or its bytes.
            run: a `Path` of a zip of the training run's folder, or the name of a training run below
                the server's FIDELORA_JOBS_PATH.
            settings: settings of a picture whose file does not contain them (`program`, `prompt`,
                `negative`, `steps`, `sampler`, `scheduler`, `guidance`, `seed`, `clip_skip`), and
                `step` and `index` of the sample to compare with.

        Raises:
            ApiError: the picture or the training run cannot be used (`EXPLANATION_FAILED`).
            ApiUnavailableError: the server cannot be reached, or is busy with another picture.
            ImageRecordError, UsageError: a file cannot be read.
        """
        return self._run(self._flows.explain(picture, run, settings))

    def wait(
        self,
        request_id: str,
        *,
        timeout_s: float | None = None,
        on_progress: Callable[[StatusBody], None] | None = None,
        cancel_on_timeout: bool = False,
    ) -> ResultBody:
        """Wait until a request has succeeded, failed or been canceled.

        Args:
            timeout_s: seconds to wait; None for no limit.
            on_progress: called with each new status.
            cancel_on_timeout: True to cancel the request after `timeout_s`.

        Raises:
            ClientTimeoutError: the request took longer than `timeout_s`. The server continues it
                unless `cancel_on_timeout` is set.
        """
        return self._run(self._flows.wait(request_id, timeout_s, on_progress, cancel_on_timeout))

    def events(
        self, request_id: str, *, timeout_s: float | None = None, previews: bool = False
    ) -> Iterator[StatusBody]:
        """Yield each new status until the request has ended. Polls servers without an event stream.

        Args:
            previews: True to include previews (`preview`, a JPEG in base64) if the server has them.

        Raises:
            ClientTimeoutError: the request took longer than `timeout_s`.
        """
        return self._iterate(Run(self._flows.events(request_id, timeout_s, previews)))

    def status(self, request_id: str) -> StatusBody:
        """Return the current status of a request."""
        return self._run(self._flows.status(request_id))

    def result(self, request_id: str) -> ResultBody:
        """Return the result of a request; it has images once the request succeeded."""
        return self._run(self._flows.result(request_id))

    def cancel(self, request_id: str) -> StatusBody:
        """Cancel a request: at once if it is queued, after the current step if it is running."""
        return self._run(self._flows.cancel(request_id))

    def requests(self, *, status: Status | None = None) -> Iterator[StatusBody]:
        """Yield all requests, newest first; with `status`, only those that have it."""
        return self._iterate(Run(self._flows.requests(status)))

    def image(self, request_id: str, index: int) -> bytes:
        """Return the bytes of an image file; `index` counts from 0."""
        return self._run(self._flows.image(request_id, index))

    def save_images(self, result: ResultBody, folder: str | Path) -> list[Path]:
        """Write all images and videos of a result into a folder; each file is written atomically.

        Raises:
            UsageError: the result has no images.
            OutputError: a downloaded image is damaged, or a file cannot be written.
        """
        return self._run(self._flows.save_images(result, Path(folder)))

    def models(self) -> list[ModelBody]:
        """Return the model families of the server."""
        return self._run(self._flows.models())

    def loras(self) -> Iterator[LoraBody]:
        """Yield the LoRAs that requests can use, sorted by path."""
        return self._iterate(Run(self._flows.loras()))

    def upload_lora(self, path: str | Path, name: str | None = None) -> LoraBody:
        """Upload a LoRA; requests refer to it by the returned `path`.

        Raises:
            UsageError: the file cannot be read.
            ApiError: the server refuses the file.
        """
        return self._run(self._flows.upload_lora(Path(path), name))

    def delete_lora(self, name: str) -> None:
        """Delete an uploaded LoRA."""
        self._run(self._flows.delete_lora(name))

    def ready(self) -> bool:
        """True if the server can be reached and has loaded the base model."""
        return self._run(self._flows.ready())

    def _run(self, flow: Flow[Result]) -> Result:
        run = Run(flow)
        for _ in self._iterate(run):
            pass
        return run.result

    def _iterate(self, run: Run[Any]) -> Iterator[Any]:
        connection, answer = _Connection(self._http), None
        try:
            while (step := run.advance(answer)) is not None:
                if isinstance(step, flows.Item):
                    yield step.value
                    answer = None
                else:
                    answer = connection.perform(step)
        finally:
            connection.perform(flows.CloseStream())
            run.close()


class _Connection:
    """Performs the steps of one flow."""

    def __init__(self, http: httpx2.Client) -> None:
        self._http = http
        self._stream: httpx2.Response | None = None
        self._lines: Iterator[str] = iter(())

    def perform(self, step: Step) -> Answer:
        try:
            match step:
                case Call():
                    return self._send(step)
                case flows.ReadLine():
                    return next(self._lines, None)
                case flows.CloseStream() if self._stream is not None:
                    self._stream.close()
                case flows.Pause():
                    time.sleep(step.seconds)
        except httpx2.TransportError as error:
            return error
        return None

    def _send(self, call: Call) -> httpx2.Response:
        response = self._http.send(call.build(self._http), stream=call.stream)
        if call.stream:
            self._stream, self._lines = response, response.iter_lines()
            if not response.is_success:
                response.read()
        return response
