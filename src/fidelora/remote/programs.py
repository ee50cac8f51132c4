"""APIs of image servers: which one a server has, and how a sample is requested.

Sources: docs/reference/http.md; https://github.com/AUTOMATIC1111/stable-diffusion-webui,
`modules/api/api.py`; https://github.com/comfyanonymous/ComfyUI, `server.py` and `execution.py`;
https://platform.openai.com/docs/api-reference/images.
"""

from __future__ import annotations

import base64
import binascii
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fidelora.api import request_for
from fidelora.client import Client
from fidelora.errors import ApiError, ClientTimeoutError, UsageError
from fidelora.explain.nearest import NearestPicture, Target
from fidelora.explain.reading import stem
from fidelora.explain.write import comfyui_workflow, lora_name, lora_of, txt2img_body
from fidelora.images.a1111_samplers import name_of
from fidelora.recipe import Recipe
from fidelora.remote.connection import Connection

Api = Literal["fidelora", "inference", "a1111", "comfyui", "openai"]
_POLL_S = 0.5  # seconds between two polls of a queued picture
_OWN_TITLE = "Fidelora"  # title in /openapi.json of Fidelora's server


@dataclass(frozen=True)
class Names:
    """Names on the server that differ from those of the training run's files.

    Attributes:
        model: base model or checkpoint; empty for the one of the same name.
        lora: LoRA; empty for the name of its file.
    """

    model: str = ""
    lora: str = ""


class RemoteProgram(ABC):
    """A server with one API.

    Attributes:
        api: name of the API.
        target: program whose nearest settings are sent; None if the server is expected to make the
            trainer's sample.
    """

    api: ClassVar[Api]
    target: Target | None = None

    def __init__(self, connection: Connection, names: Names) -> None:
        self._connection = connection
        self._names = names

    @abstractmethod
    def picture(self, recipe: Recipe, nearest: NearestPicture | None) -> bytes:
        """Return the file of a sample's picture.

        Args:
            nearest: settings for `target`; None if `target` is None.

        Raises:
            ApiError: the server rejected the request, or its response is unexpected.
            ApiUnavailableError: the server cannot be reached.
            ClientTimeoutError: the picture took too long.
        """

    def _pause(self, deadline: float) -> None:
        """Pause before the next poll.

        Raises:
            ClientTimeoutError: the deadline has passed.
        """
        if time.monotonic() >= deadline:
            raise ClientTimeoutError(
                f"{self._connection.host} did not make the picture in "
                f"{self._connection.timeout_s:g} seconds; raise --timeout."
            )
        time.sleep(_POLL_S)

    def _deadline(self) -> float:
        return time.monotonic() + self._connection.timeout_s


class FideloraServer(RemoteProgram):
    """Fidelora's server, which gets the complete recipe and finds the LoRA by its content."""

    api = "fidelora"

    def picture(self, recipe: Recipe, nearest: NearestPicture | None) -> bytes:
        one = self._connection
        with Client(one.base_url, api_key=one.key or None, transport=one.transport) as client:
            output_format = "png" if recipe.frames == 1 else "webp"
            accepted = client.replay(recipe, base_model="server", output_format=output_format)
            client.wait(accepted.request_id, timeout_s=one.timeout_s, cancel_on_timeout=True)
            return client.image(accepted.request_id, 0)


class InferenceServer(RemoteProgram):
    """A server with the API of `ai-toolkit-inference`."""

    api = "inference"

    def picture(self, recipe: Recipe, nearest: NearestPicture | None) -> bytes:
        one = self._connection
        queued = one.post("/v1/inference", self._body(recipe))
        request_id = _text(queued, "request_id")
        if request_id is None:
            raise one.unexpected("/v1/inference")
        path, deadline = f"/v1/requests/{request_id}", self._deadline()
        while (status := _text(one.get(f"{path}/status"), "status")) != "succeeded":
            if status not in ("in_queue", "queued", "in_progress"):
                error = _text(one.get(f"{path}/status"), "error") or "no message"
                raise ApiError(f"{one.host}: the request ended as {status!r:.40}: {error:.200}.")
            self._pause(deadline)
        images = _at(one.get(f"{path}/result"), "outputs", "images")
        if not isinstance(images, list) or not images:
            raise one.unexpected(f"{path}/result")
        if not _text(images[0], "url"):
            raise ApiError(
                f"{one.host} does not return its pictures over HTTP, only the path of a file. "
                "Compare that file with fidelora explain."
            )
        return one.download(f"{path}/images/0")

    def _body(self, recipe: Recipe) -> dict[str, Any]:
        """Return a request with the fields that all servers of this API have."""
        ref = lora_of(recipe)
        path = self._names.lora or (ref.path.name if ref and ref.path else "")
        if ref is None:
            raise UsageError(
                "A request of this API requires a LoRA, but the sample has none; choose another "
                "--step."
            )
        full = request_for([recipe], [path])
        (item,) = full["prompts"]
        multiplier = item.pop("network_multiplier")
        return {
            "model": self._names.model or full["model"],
            "loras": [{"path": path, "network_multiplier": multiplier}],
            "prompts": [item],
        }


class OpenAIServer(RemoteProgram):
    """A server with OpenAI's Images API and Fidelora's additional fields."""

    api = "openai"

    def picture(self, recipe: Recipe, nearest: NearestPicture | None) -> bytes:
        ref = lora_of(recipe)
        path = self._names.lora or (ref.path.name if ref and ref.path else "")
        loras = [{"path": path, "network_multiplier": ref.multiplier}] if ref else []
        body = {
            "model": self._names.model or recipe.model,
            "prompt": recipe.prompt,
            "n": 1,
            "size": f"{recipe.width}x{recipe.height}",
            "response_format": "b64_json",
            "negative_prompt": recipe.negative_prompt,
            "seed": recipe.seed,
            "steps": recipe.steps,
            "guidance_scale": recipe.guidance_scale,
            "sampler": recipe.sampler,
            "loras": loras,
        }
        path = "/v1/images/generations"
        if self._connection.base_url.endswith("/v1"):
            path = path.removeprefix("/v1")
        data = _at(self._connection.post(path, body), "data")
        content = _text(data[0], "b64_json") if isinstance(data, list) and data else None
        return _decoded(content, self._connection, path)


class A1111Server(RemoteProgram):
    """A server with the API of AUTOMATIC1111's web UI, started with `--api`."""

    api = "a1111"

    def __init__(self, connection: Connection, names: Names, *, is_own: bool) -> None:
        super().__init__(connection, names)
        self._is_own = is_own
        self.target = None if is_own else "A1111"

    def picture(self, recipe: Recipe, nearest: NearestPicture | None) -> bytes:
        if nearest is None:
            body = self._own_body(recipe)
        else:
            body = txt2img_body(nearest, lora=self._names.lora)
        if self._names.model:
            body["override_settings"]["sd_model_checkpoint"] = self._names.model
        path = "/sdapi/v1/txt2img"
        images = _at(self._connection.post(path, body), "images")
        content = images[0] if isinstance(images, list) and images else None
        return _decoded(content, self._connection, path)

    def _own_body(self, recipe: Recipe) -> dict[str, Any]:
        """Return the body for Fidelora, which has the trainer's samplers under A1111's names."""
        sampler, schedule = name_of(recipe.sampler)
        prompt = recipe.prompt
        if ref := lora_of(recipe):
            prompt += f" <lora:{self._names.lora or lora_name(ref)}:{ref.multiplier:g}>"
        return {
            "prompt": prompt,
            "negative_prompt": recipe.negative_prompt,
            "steps": recipe.steps,
            "sampler_name": sampler,
            "scheduler": schedule or "Automatic",
            "cfg_scale": recipe.guidance_scale,
            "seed": recipe.seed,
            "width": recipe.width,
            "height": recipe.height,
            "override_settings": {"sd_model_checkpoint": recipe.model, "emphasis": "None"},
        }


class ComfyUIServer(RemoteProgram):
    """ComfyUI, which runs the workflow of `fidelora explain --write comfyui`."""

    api = "comfyui"
    target = "ComfyUI"

    def picture(self, recipe: Recipe, nearest: NearestPicture | None) -> bytes:
        assert nearest is not None, "`target` is set"
        one = self._connection
        checkpoint = self._names.model or self._file(
            "CheckpointLoaderSimple", "ckpt_name", stem(recipe.base_model), "--server-model"
        )
        ref, lora = lora_of(recipe), self._names.lora
        if ref is not None and not lora:
            lora = self._file("LoraLoader", "lora_name", lora_name(ref), "--server-lora")
        workflow = comfyui_workflow(nearest, checkpoint=checkpoint, lora=lora)
        prompt_id = _text(one.post("/prompt", {"prompt": workflow}), "prompt_id")
        if prompt_id is None:
            raise one.unexpected("/prompt")
        path, deadline = f"/history/{prompt_id}", self._deadline()
        while not (entry := _at(one.get(path), prompt_id)):
            self._pause(deadline)
        if _at(entry, "status", "status_str") == "error":
            raise ApiError(f"{one.host}: ComfyUI could not run the workflow: {_failure(entry)}.")
        outputs = _at(entry, "outputs")
        for output in outputs.values() if isinstance(outputs, dict) else ():
            images = _at(output, "images")
            for image in images if isinstance(images, list) else ():
                return one.download(
                    "/view",
                    {name: _text(image, name) or "" for name in ("filename", "subfolder", "type")},
                )
        raise one.unexpected(path)

    def _file(self, node: str, field: str, wanted: str, option: str) -> str:
        """Return the name of a file in ComfyUI, found by its stem.

        Raises:
            ApiError: ComfyUI has no such file.
        """
        info = _at(self._connection.get(f"/object_info/{node}"), node, "input", "required", field)
        # A list of names, or the type COMBO with the names among its options.
        choices = info[0] if isinstance(info, list) and info else None
        if choices == "COMBO":
            choices = _at(info[1], "options") if len(info) > 1 else None
        names = [one for one in choices or () if isinstance(one, str)]
        for name in names:
            if stem(name).lower() == wanted.lower():
                return name
        known = ", ".join(names[:20]) or "no file"
        raise ApiError(
            f"{self._connection.host} has no file named {wanted}; set {option} to one of: {known}."
        )


def connect(connection: Connection, api: Api | None, names: Names) -> RemoteProgram:
    """Return the program of a server.

    Args:
        api: the API to use; None to find it.

    Raises:
        ApiError: the server has none of these APIs, or requires another key.
        ApiUnavailableError: the server cannot be reached.
    """
    is_own = _at(connection.find("/openapi.json"), "info", "title") == _OWN_TITLE
    if api is None:
        api = "fidelora" if is_own else _detected(connection)
    if api == "a1111":
        return A1111Server(connection, names, is_own=is_own)
    kinds: Iterable[type[RemoteProgram]] = (
        FideloraServer, InferenceServer, OpenAIServer, ComfyUIServer,
    )  # fmt: skip
    return next(kind for kind in kinds if kind.api == api)(connection, names)


def _detected(connection: Connection) -> Api:
    if isinstance(_at(connection.find("/system_stats"), "system"), dict):
        return "comfyui"
    if isinstance(connection.find("/sdapi/v1/samplers"), list):
        return "a1111"
    prefix = "" if connection.base_url.endswith("/v1") else "/v1"
    models = connection.find(f"{prefix}/models")
    if isinstance(_at(models, "models"), list):
        return "inference"
    if isinstance(_at(models, "data"), list):
        return "openai"
    raise ApiError(
        f"{connection.host} has none of the supported APIs; check the address, or set --api."
    )


def _at(value: Any, *names: str) -> Any:
    """Return a value in nested objects; None if it does not exist."""
    for name in names:
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value


def _text(value: Any, name: str) -> str | None:
    found = _at(value, name)
    return found if isinstance(found, str) else None


def _decoded(content: object, connection: Connection, path: str) -> bytes:
    if not isinstance(content, str):
        raise connection.unexpected(path)
    try:
        return base64.b64decode(content.rpartition(",")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise connection.unexpected(path) from error


def _failure(entry: Any) -> str:
    """Return the message of an error in ComfyUI's history."""
    messages = _at(entry, "status", "messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, list) and message[:1] == ["execution_error"] and len(message) > 1:
            text = _text(message[1], "exception_message") or "no message"
            return f"{_text(message[1], 'node_type') or 'a node'}: {text:.200}"
    return "no message"
