"""A stand-in for ComfyUI with its routes `/system_stats`, `/object_info`, `/prompt`, `/history` and
`/view`, after https://github.com/comfyanonymous/ComfyUI, server.py."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Make = Callable[[Mapping[str, Any]], bytes]
_FILES = {
    "CheckpointLoaderSimple": ("ckpt_name", ["other.safetensors", "models/tiny-sd15.safetensors"]),
    "LoraLoader": ("lora_name", ["people/lora_linear_f32.safetensors"]),
}


class ComfyUI:
    """A server on 127.0.0.1.

    Args:
        make: returns the PNG of a graph; an exception is a failed node.
        is_combo: True to list files as newer versions do.
    """

    def __init__(self, make: Make, *, is_combo: bool = False) -> None:
        self.graphs: list[Any] = []
        self.authorizations: list[str | None] = []
        self._make = make
        self._is_combo = is_combo
        self._files: dict[str, bytes] = {}
        self._history: dict[str, Any] = {}
        self._polls: dict[str, int] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.authorizations.append(self.headers.get("Authorization"))
                self._answer(*outer.get(self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._answer(*outer.post(self.path, body))

            def _answer(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        options = {"poll_interval": 0.01}
        threading.Thread(target=self._server.serve_forever, kwargs=options, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def get(self, url: str) -> tuple[int, bytes]:
        parts = urlsplit(url)
        last = parts.path.rpartition("/")[2]
        if parts.path == "/system_stats":
            return _json(200, {"system": {"comfyui_version": "0.3.60"}, "devices": []})
        if parts.path.startswith("/object_info/"):
            field, names = _FILES[last]
            choices = ["COMBO", {"options": names}] if self._is_combo else [names, {}]
            return _json(200, {last: {"input": {"required": {field: choices}}}})
        if parts.path.startswith("/history/"):
            # A prompt that is still running is not in the history.
            self._polls[last] = self._polls.get(last, 0) + 1
            entry = self._history[last] if self._polls[last] > 1 else None
            return _json(200, {last: entry} if entry else {})
        if parts.path == "/view":
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            assert query["type"] == "output"
            return 200, self._files[query["filename"]]
        return 404, b"404: Not Found"

    def post(self, url: str, body: Any) -> tuple[int, bytes]:
        assert url == "/prompt"
        graph = body["prompt"]
        self.graphs.append(graph)
        checkpoint = graph["4"]["inputs"]["ckpt_name"]
        if checkpoint not in _FILES["CheckpointLoaderSimple"][1]:
            error = {"type": "prompt_outputs_failed_validation", "message": "Prompt outputs failed"}
            nodes = {"4": {"errors": [{"details": f"ckpt_name: '{checkpoint}' not in list"}]}}
            return _json(400, {"error": error, "node_errors": nodes})
        prompt_id = f"prompt-{len(self.graphs)}"
        try:
            name = f"fidelora_{len(self.graphs):05}_.png"
            self._files[name] = self._make(graph)
            image = {"filename": name, "subfolder": "", "type": "output"}
            status: Any = {"status_str": "success", "completed": True, "messages": []}
            outputs: Any = {"9": {"images": [image]}}
        except RuntimeError as error:
            message = {"node_type": "KSampler", "exception_message": str(error)}
            messages = [["execution_start", {}], ["execution_error", message]]
            status = {"status_str": "error", "completed": False, "messages": messages}
            outputs = {}
        self._history[prompt_id] = {"prompt": [], "outputs": outputs, "status": status}
        return _json(200, {"prompt_id": prompt_id, "number": 1, "node_errors": {}})


def _json(status: int, body: Any) -> tuple[int, bytes]:
    return status, json.dumps(body).encode()
