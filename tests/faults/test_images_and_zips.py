"""Hostile images through the routes that read them, and hostile zips through the page."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gradio as gr
import pytest
from tests.faults.fault_support import (
    MAX_GROWTH_BYTES,
    FaultServer,
    assert_is_message,
    in_time,
    memory_bytes,
)
from tests.faults.fuzz.targets import check_message
from tests.faults.hostile_images import good_images, hostile_images, mutated_images
from tests.faults.hostile_zips import MAX_ZIP_BYTES, MIB, good_zip, hostile_zips, mutated_zips
from tests.faults.rounds import INPUT_ROUNDS

from fidelora.errors import FideloraError
from fidelora.images.read import read_origin, read_parameters_text
from fidelora.server.page import match_tab
from fidelora.server.submit import utc_now
from fidelora.server.verifier import Outcome

if TYPE_CHECKING:
    from fidelora.server.verifier import Verifier

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:PIL.*", "ignore::PIL.Image.DecompressionBombWarning"
)

MAX_UPLOADED = 12
"""Number of images of each kind that are also sent over HTTP in the ordinary suite."""


def read(content: bytes) -> bool:
    """Read an image as programs do; return True if it has a recipe or parameters."""
    for function in (read_parameters_text, read_origin):
        try:
            in_time(partial(function, content))
        except FideloraError as error:
            check_message(error)
            return False
    return True


def send(server: FaultServer, name: str, content: bytes) -> None:
    """Replay an image and read its parameters over HTTP; a job that is queued is canceled."""
    before = server.files()
    replayed = server.post("/v1/replay", files={"image": (name, content)})
    if replayed.status_code == 200:
        server.context.store.cancel(replayed.json()["request_id"], utc_now())
    encoded = base64.b64encode(content).decode()
    server.post("/sdapi/v1/png-info", {"image": encoded})
    assert server.files() == before


def test_good_images_are_read(server):
    for content in good_images().values():
        read_parameters_text(content)
    assert sum(map(read, good_images().values())) == len(good_images()) - 1, (
        "a good image was refused (one has no parameters)"
    )
    own = good_images()["own.png"]
    response = server.post("/v1/replay", {"image": 5})
    assert response.status_code == 422
    assert server.post("/v1/replay", files={"image": ("own.png", own)}).status_code == 400
    assert "base model" in server.post("/v1/replay", files={"image": ("own.png", own)}).text


def test_hostile_images_are_read_or_refused():
    found = hostile_images()
    assert len(found) >= 300
    for content in found.values():
        read(content)


def test_images_with_random_changes_are_read_or_refused():
    count = 0
    for _name, content in mutated_images(4 * INPUT_ROUNDS):
        read(content)
        count += 1
    assert count >= 200


def test_hostile_images_over_http_never_fail_the_server(server):
    # Every route reads images with the same function, so a part of them is enough here.
    found = list(hostile_images().items())
    chosen = found if INPUT_ROUNDS > 1 else found[:: len(found) // 60]
    chosen += [(name, content) for name, content in found if "deep" in name or "bomb" in name]
    for name, content in chosen:
        send(server, name, content)
    for name, content in list(mutated_images(INPUT_ROUNDS))[:: 2 if INPUT_ROUNDS == 1 else 1]:
        send(server, name, content)


# --- zips -----------------------------------------------------------------------------------------


class FakeVerifier:
    """A verifier that starts no process."""

    busy = False

    def __init__(self) -> None:
        self.runs: list[str] = []

    async def run(
        self, verification_id: str, folder: Path, *_given: Any, **_options: Any
    ) -> AsyncIterator[Outcome]:
        self.runs.append(folder.name)
        yield Outcome(0, None)


@pytest.fixture(scope="module")
def verifier() -> FakeVerifier:
    return FakeVerifier()


@pytest.fixture(scope="module")
def tab(server: FaultServer, verifier: FakeVerifier) -> match_tab.MatchTab:
    """The page's Match tab, for zips of up to 4 MiB."""
    settings = server.context.settings.model_copy(update={"job_max_mb": MAX_ZIP_BYTES // MIB})
    context = replace(server.context, settings=settings)
    with gr.Blocks():
        return match_tab.MatchTab(context, server.page_files, cast("Verifier", verifier))


@pytest.fixture
def drop(server: FaultServer, tab: Any):
    """Return a function that verifies a dropped zip, and returns the page's last message."""

    def verify(content: bytes) -> str:
        archive = server.page_files.files / "dropped.zip"
        archive.write_bytes(content)
        before = set(server.folder.rglob("*")) - {archive}

        async def run() -> list[Any]:
            return [one async for one in tab._verify(None, str(archive), "last", False)]

        updates = in_time(lambda: asyncio.run(run()))
        assert set(server.folder.rglob("*")) <= before, "files are left on the disk"
        message = str(updates[-1][0])
        assert str(server.folder) not in message
        assert_is_message(message)
        return message

    return verify


def test_a_good_zip_is_verified(drop, verifier):
    drop(good_zip())
    assert verifier.runs.pop() == "run"


def test_hostile_zips_are_refused_and_leave_nothing(drop, verifier):
    found = hostile_zips()
    assert len(found) >= 120
    before = memory_bytes()
    accepted = []
    for name, content in found.items():
        message = drop(content)
        if verifier.runs:
            accepted.append(name)
            verifier.runs.clear()
        else:
            assert 'class="message error"' in message, name
    assert accepted == []
    assert memory_bytes() - before <= MAX_GROWTH_BYTES


def test_zips_with_random_changes_are_verified_or_refused(drop, verifier):
    for _name, content in mutated_zips(50 * INPUT_ROUNDS):
        drop(content)
    assert verifier.runs, "every zip was refused, although some changes are harmless"
    verifier.runs.clear()
