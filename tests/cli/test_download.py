"""`fidelora download`, with a stand-in of the hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.support import LORA, TINY_BASE

from fidelora.cli import download
from fidelora.errors import AdapterExistsError
from fidelora.loras.hub import HubFile

COMMIT = "c" * 40


@dataclass
class Hub:
    """A hub on 127.0.0.1.

    Attributes:
        files: contents by "owner/name/path".
        requests: method and path of each request.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def add_folder(self, repo: str, folder: Path) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.files[f"{repo}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """Return status, body and headers for a path."""
        parts = path.partition("?")[0].strip("/").split("/")
        if parts[0] == "api":
            repo = "/".join(parts[2:4])
            names = [name.removeprefix(f"{repo}/") for name in self.files if repo in name]
            if not names:
                return 404, b"{}", {"X-Error-Code": "RepoNotFound"}
            body: object = {"id": repo, "sha": COMMIT}
            if parts[4] == "tree":
                body = [
                    {
                        "type": "file",
                        "path": one,
                        "oid": one,
                        "size": len(self.files[f"{repo}/{one}"]),
                    }
                    for one in names
                ]
            return 200, json.dumps(body).encode(), {"Content-Type": "application/json"}
        content = self.files.get("/".join([*parts[:2], *parts[4:]]))
        if content is None:
            return 404, b"", {"X-Error-Code": "EntryNotFound"}
        etag = hashlib.sha256(content).hexdigest()
        return 200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            status, body, headers = hub.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD = _answer

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def run(hub: Hub, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run `fidelora download` in a new process, which reads the address of the hub when it starts.

    Returns:
        exit code, stdout and stderr.
    """
    variables = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(Path.cwd() / "hf"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    inherited = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-m", "fidelora", "download", *arguments],
        env={**inherited, **variables, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_base_model_is_downloaded_once_and_then_found_offline(hub):
    hub.add_folder("me/tiny", TINY_BASE)
    hub.files["me/tiny/unet/other.bin"] = b"not needed"
    code, out, err = run(hub, "me/tiny")
    assert (code, err) == (0, "")
    folder = Path(out.strip())
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (folder / weights).read_bytes() == (TINY_BASE / weights).read_bytes()
    assert not any("other.bin" in request for request in hub.requests)
    hub.requests.clear()
    assert run(hub, "me/tiny", HF_HUB_OFFLINE="1") == (0, out, "")
    assert hub.requests == []


def test_a_lora_is_downloaded_to_a_folder(hub, tmp_path):
    hub.files["me/loras/sub/sks.safetensors"] = LORA.read_bytes()
    source = "hf:me/loras/sub/sks.safetensors"
    expected = (0, "loras/sks.safetensors\n", "")
    assert run(hub, source, "-o", "loras") == expected
    assert (tmp_path / "loras" / "sks.safetensors").read_bytes() == LORA.read_bytes()
    assert [path.name for path in (tmp_path / "loras").iterdir()] == ["sks.safetensors"]
    assert run(hub, source, "-o", "loras", HF_HUB_OFFLINE="1") == expected
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert run(hub, source, "-o", "loras", **unreachable) == expected, (
        "the LoRA was not taken from the cache"
    )


@pytest.mark.parametrize(
    ("source", "environment", "code", "words"),
    [
        ("hf:me/loras/none.safetensors", {}, 2, "hf:me/loras/none.safetensors does not exist"),
        ("hf:me/loras/a.safetensors", {"HF_HUB_OFFLINE": "1"}, 2, "HF_HUB_OFFLINE is set"),
        (
            "hf:me/loras/a.safetensors",
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            1,
            "is not in the local cache, and the hub cannot be reached",
        ),
        ("hf:me/loras/page.safetensors", {}, 1, "is a web page (HTML)"),
        (
            "me/none",
            {},
            2,
            "me/none is neither a folder on this machine nor a repository on the hub",
        ),
        ("sd15", {"HF_HUB_OFFLINE": "1"}, 2, "unset HF_HUB_OFFLINE"),
        ("hf:me/loras", {}, 2, "use hf:owner/name/file.safetensors"),
        ("http://files.example/a.safetensors", {}, 2, "is not https"),
        ("https://127.0.0.1/a.safetensors", {}, 2, "is not on the public internet"),
    ],
)
def test_a_failed_download_is_one_sentence_and_leaves_no_file(
    hub, tmp_path, source, environment, code, words
):
    hub.files["me/loras/page.safetensors"] = b"<!DOCTYPE html><html>"
    folder = ["-o", "loras"] if ":" in source else []  # base models have no folder
    found, out, err = run(hub, source, *folder, **environment)
    assert (found, out) == (code, "")
    assert words in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not [path for path in tmp_path.rglob("loras/*") if path.is_file()]


def test_another_file_with_the_same_name_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(HubFile, "fetch", lambda *_: LORA)
    target = tmp_path / "sks.safetensors"
    target.write_bytes(b"mine")
    with pytest.raises(AdapterExistsError, match="has other contents"):
        download._fetch_lora("hf:me/loras/sks.safetensors", tmp_path)
    assert target.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hf:a/b/c/sks v1.safetensors@main", "sks v1.safetensors"),
        ("https://x.y/z/sks.safetensors?token=secret#a", "sks.safetensors"),
        ("https://x.y/api/download/models/123", "123.safetensors"),
        ("https://x.y/%2e%2e%2fetc%2fpasswd", "passwd.safetensors"),
        ("https://x.y/", "lora.safetensors"),
        ("https://x.y/.hidden", "hidden.safetensors"),
    ],
)
def test_the_name_of_the_file_comes_from_its_address(source, name):
    assert download._file_name(source) == name


def test_options_of_base_models_are_refused_for_loras(fidelora):
    code, _, err = fidelora("download", "hf:a/b/c.safetensors", "--model", "sdxl")
    assert code == 2
    assert "--model and --variant apply to base models only" in err
    code, _, err = fidelora("download", "sd15", "--model", "sdxl")
    assert (code, "leave out --model sdxl" in err) == (2, True)


def test_a_bundled_base_model_is_found_without_a_download(fidelora):
    code, out, _ = fidelora("download", "fidelora:miniature")
    assert code == 0
    assert Path(out.strip()).name == "miniature"
    assert fidelora("download", "fidelora:miniature", "-q") == (0, "", "")
