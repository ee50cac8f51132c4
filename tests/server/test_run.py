"""The start of the server process: what is logged, and when."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
import uvicorn
from tests.server.http_support import context_in
from tests.support import TINY_BASE

from fidelora.server import run
from fidelora.server.run import _announce, _UvicornServer

TIMEOUT_S = 20.0


def app_whose_start(event: str) -> Any:
    """Return an application whose start ends with this event."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "lifespan"
        while (await receive())["type"] == "lifespan.startup":
            await send({"type": f"lifespan.startup.{event}"})
        await send({"type": "lifespan.shutdown.complete"})

    return app


@pytest.mark.parametrize(("event", "started"), [("complete", [True]), ("failed", [])])
def test_the_start_is_announced_when_connections_are_accepted(event, started):
    listener = socket.create_server(("127.0.0.1", 0))
    answers: list[bool] = []

    def on_start() -> None:
        with socket.create_connection(listener.getsockname(), TIMEOUT_S):
            answers.append(server.started)
        server.should_exit = True

    config = uvicorn.Config(app_whose_start(event), log_config=None, lifespan="on")
    server = _UvicornServer(config, on_start)
    with suppress(SystemExit):  # how uvicorn ends if the application did not start
        # Not in `wait_for`, whose task would be left behind with an exception.
        asyncio.run(server.serve(sockets=[listener]))
    assert answers == started


@pytest.mark.parametrize(
    ("log_format", "lines"), [("text", ["http://127.0.0.1:8000"]), ("json", [])]
)
def test_on_terminals_the_address_has_its_own_line(
    tmp_path, monkeypatch, capsys, log_format, lines
):
    events: list[tuple[str, str]] = []

    class Log:
        def info(self, event: str, **fields: str) -> None:
            events.append((event, fields["url"]))

    monkeypatch.setattr(run, "log", Log())
    _announce(context_in(tmp_path, log_format=log_format), "http://0.0.0.0:8000")
    assert capsys.readouterr().err.splitlines() == lines
    assert events == [("listening", "http://0.0.0.0:8000")]


def test_ctrl_c_during_the_start_stops_the_server(tmp_path):
    program = """
import os, signal
from fidelora.server import run
from fidelora.settings import Settings

make_app = run.make_app

def interrupted(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGINT)
    return make_app(*args, **kwargs)

run.make_app = interrupted
run.serve(Settings())
"""
    environment = {name: os.environ[name] for name in os.environ if "FIDELORA" not in name}
    environment |= {
        "FIDELORA_DATA_DIR": str(tmp_path),
        "FIDELORA_BASE_MODEL": str(TINY_BASE),
        "FIDELORA_PAGE": "false",
        "FIDELORA_PORT": "0",
        "DEVICE": "cpu",
    }
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stderr.count("Traceback")) == (0, 0), ended.stderr
    assert '"event": "stopped"' in ended.stderr
