"""Hostile adapter files: inspected, uploaded and used in a job of a real engine."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tests.faults.fault_support import (
    MAX_GROWTH_BYTES,
    SMALL,
    FaultServer,
    assert_is_message,
    in_time,
)
from tests.faults.fuzz.targets import check_message
from tests.faults.hostile_adapters import SOUND, Hostile, hostile_adapters
from tests.faults.test_kills import workers_of
from tests.server.serve_support import Server

from fidelora.engine.examine import examine_adapter
from fidelora.errors import FideloraError
from fidelora.jobs.job import Status

FILES = list(hostile_adapters())
NAME = "hostile.safetensors"


@pytest.fixture(scope="module")
def after_a_sound_job(server: FaultServer) -> None:
    """Run a job with a sound adapter, which also loads the base model."""
    (server.loras / "sound.safetensors").write_bytes(SOUND)
    response = server.post("/v1/inference", request_for("sound.safetensors"))
    assert response.status_code == 200
    (done,) = server.run_jobs()
    assert done.status is Status.SUCCEEDED


@pytest.fixture
def put(server: FaultServer):
    """Return a function that puts a hostile file into the server's LoRA folder."""
    target = server.loras / NAME

    def write(hostile: Hostile) -> Path:
        hostile.write(target)
        return target

    yield write
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


def request_for(path: str) -> dict[str, Any]:
    return {
        "model": "sd15",
        "loras": [{"path": path}],
        "prompts": [{"prompt": "a [trigger]", **SMALL}],
    }


def test_there_are_many_different_files():
    assert len({hostile.name for hostile in FILES}) == len(FILES) >= 140


@pytest.mark.usefixtures("after_a_sound_job")
@pytest.mark.parametrize("hostile", FILES, ids=lambda hostile: hostile.name)
def test_a_hostile_file_is_refused_everywhere(server, put, hostile):
    path = put(hostile)
    check_inspection(path, hostile)
    before, newest = server.files(), server.newest_id()
    if hostile.is_plain:
        check_upload(server, path, hostile)
        assert server.files() == before
    response = server.post("/v1/inference", request_for(NAME))
    if hostile.outcome == "refused":
        assert 400 <= response.status_code < 500
        assert server.newest_id() == newest
        assert server.files() == before
        return
    if response.status_code == 200:
        (job,) = server.run_jobs()
        if hostile.outcome == "job fails":
            assert job.status is Status.FAILED
        if job.error is not None:
            assert_is_message(job.error.message)
            assert not job.outputs
            assert job.attempts == 1


def check_inspection(path: Path, hostile: Hostile) -> None:
    """Check that `fidelora inspect` reports a `refused` file as unusable, and never fails."""
    try:
        found = in_time(lambda: examine_adapter(path))
    except FideloraError as error:
        check_message(error)
        assert hostile.outcome != "any"
        return
    for problem in found.problems:
        assert_is_message(problem.message)
    assert not found.usable or hostile.outcome != "refused"


def check_upload(server: FaultServer, path: Path, hostile: Hostile) -> None:
    """Upload a file; if it is accepted, delete it again."""
    with path.open("rb") as file:
        response = server.post("/v1/loras", files={"file": (NAME, file)})
    if hostile.outcome == "refused":
        assert 400 <= response.status_code < 500
    elif response.status_code == 201:
        assert len(response.content) < 10_000, "the summary is long"
        assert server.call("DELETE", f"/v1/loras/{NAME}").status_code == 204


def own_memory(process_id: int) -> int:
    """Return the bytes of a process's memory that are not pages of files."""
    status = Path(f"/proc/{process_id}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def upload_and_use(server: Server, path: Path) -> None:
    """Upload a file and request an image with it; both may be refused."""
    body = b'--hostile\r\nContent-Disposition: form-data; name="file"; '
    body += f'filename="{NAME}"\r\n\r\n'.encode() + path.read_bytes() + b"\r\n--hostile--\r\n"
    request = urllib.request.Request(
        f"{server.url}/v1/loras",
        body,
        {"Content-Type": "multipart/form-data; boundary=hostile"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60):
            pass
        server.wait(server.ask(request_for(f"uploads/{NAME}")), "succeeded", "failed")
        delete = urllib.request.Request(f"{server.url}/v1/loras/{NAME}", method="DELETE")
        with urllib.request.urlopen(delete, timeout=60):
            pass
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            raise


@pytest.mark.timeout(900)
def test_memory_does_not_grow_with_each_hostile_file(start, tmp_path):
    """Both processes keep some of the memory that the largest file needed, but only once."""
    server = start(FIDELORA_ADAPTERS_GB="0.001")
    server.wait(server.submit(), "succeeded")
    (worker,) = workers_of(server)

    def use_all_files() -> list[int]:
        for hostile in FILES:
            if hostile.is_plain:
                path = tmp_path / "hostile"
                hostile.write(path)
                upload_and_use(server, path)
                path.unlink()
        return [own_memory(process) for process in (server.process.pid, worker)]

    before, after = use_all_files(), use_all_files()
    assert workers_of(server) == [worker]
    growth = [late - early for early, late in zip(before, after, strict=True)]
    assert max(growth) <= MAX_GROWTH_BYTES, growth
