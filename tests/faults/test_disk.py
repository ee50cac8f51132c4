"""Full disks: nothing is lost, callers receive errors, and work continues once there is room."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import urllib.error
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.faults.answers import try_submit
from tests.faults.rounds import ROUNDS
from tests.server.serve_support import Server, until
from tests.support import LORA

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0, reason="needs to mount small file systems"
    ),
]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Any]:
    """Return a function that makes a folder on a file system of this many MiB."""
    mounted: list[Path] = []

    def make(name: str, mebibytes: int) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, timeout=60, check=False).returncode:
            pytest.skip("mounting is not allowed")
        mounted.append(folder)
        return folder

    yield make
    for folder in reversed(mounted):
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=60)


def fill(folder: Path) -> Path:
    """Write a file that takes all free space of the folder's disk; return its path."""
    filler = folder / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:
        return filler


def refusal(server: Server, path: str, content: bytes, content_type: str) -> tuple[int, str]:
    """Send a body that is refused; return the status and the message."""
    request = urllib.request.Request(server.url + path, content, {"Content-Type": content_type})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    return refused.value.code, refused.value.read().decode()


def upload(content: bytes, name: str) -> tuple[bytes, str]:
    """Return the body of an upload and its content type."""
    boundary = uuid.uuid4().hex
    body = io.BytesIO()
    body.write(f'--{boundary}\r\nContent-Disposition: form-data; name="file"; '.encode())
    body.write(f'filename="{name}"\r\n\r\n'.encode())
    body.write(content + f"\r\n--{boundary}--\r\n".encode())
    return body.getvalue(), f"multipart/form-data; boundary={boundary}"


def test_requests_wait_while_images_cannot_be_written(start, small_disk):
    outputs = small_disk("images", 2)
    server = start(OUTPUT_BASE_PATH=str(outputs))
    server.ready()
    for _ in range(ROUNDS):
        filler = fill(outputs)
        waiting = server.submit(seed=0)
        until(lambda: not server._is_ready())
        refused = try_submit(server)
        assert (refused.status, refused.retry_after) == (503, "10")
        assert "No space left on device" in refused.message
        assert server.status(waiting)["status"] == "in_queue"
        filler.unlink()
        assert server.wait(waiting, "succeeded", "failed")["status"] == "succeeded"
        server.ready()


def test_uploads_are_refused_while_there_is_no_room(start, small_disk):
    loras, temporary = small_disk("small-loras", 1), small_disk("temporary", 1)
    server = start(WORKFLOWS_BASE_PATH=str(loras), TMPDIR=str(temporary))
    body, content_type = upload(LORA.read_bytes(), "a.safetensors")
    large, large_type = upload(LORA.read_bytes() + bytes(2**21), "a.safetensors")
    for folder, content, kind in ((loras, body, content_type), (temporary, large, large_type)):
        filler = fill(folder)
        code, answer = refusal(server, "/v1/loras", content, kind)
        assert (code, "disk is full" in answer or "No space left" in answer) == (507, True), answer
        filler.unlink()
    assert [path.name for path in (loras / "uploads").iterdir()] == []
    assert list(temporary.iterdir()) == []
    request = urllib.request.Request(server.url + "/v1/loras", body, {"Content-Type": content_type})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 201


def test_requests_are_refused_while_the_database_is_full(start, data, small_disk):
    disk = small_disk("database", 2)
    server = start(FIDELORA_STORE_URL=f"sqlite:///{disk}/jobs.sqlite")
    server.ready()
    before = server.submit(seed=0)
    server.wait(before, "succeeded")
    filler = fill(disk)
    refused = until(lambda: (answer := try_submit(server)).status != 200 and answer)
    assert (refused.status, refused.retry_after) == (503, "10")
    assert server.call("/health") == {"status": "healthy"}
    filler.unlink()
    after = until(lambda: try_submit(server).request_id)
    assert server.wait(after, "succeeded", "failed")["status"] == "succeeded"
    listed = server.call("/v1/requests?limit=100")["requests"]
    for entry in listed:  # the accepted ones; those that were refused do not exist
        ended = server.wait(entry["request_id"], "succeeded", "failed")
        assert ended["status"] == "succeeded"
