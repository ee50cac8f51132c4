"""A real S3 server for tests (moto), in a process of its own on the loopback interface."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx2

_START_S = 60.0
_CODE = """
import signal, sys, threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=int(sys.argv[1]), verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until the test process ends
"""


def missing() -> str:
    """Return the reason why no S3 server can be started here; empty if one can."""
    try:
        import flask_cors  # noqa: F401
        import moto  # noqa: F401
        import obstore  # noqa: F401
    except ImportError as error:
        return f"the packages of an object store are not installed: {error}"
    return ""


class ObjectStore:
    """An S3 server. It forgets all objects when it is stopped.

    Attributes:
        port: its port, also while it is stopped.
    """

    def __init__(self) -> None:
        self.port = 0
        self._process: subprocess.Popen[str] | None = None

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables with which clients find the server."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "not-a-secret",
        }

    def start(self) -> None:
        """Start the server; after a stop, on the same port."""
        environment = {**os.environ, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, str(self.port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the object store did not start"
        self.port = int(line)

    def make_bucket(self, name: str) -> str:
        """Create a bucket, and return its URL."""
        deadline = time.monotonic() + _START_S
        while True:
            try:
                httpx2.put(f"http://127.0.0.1:{self.port}/{name}").raise_for_status()
                return f"s3://{name}"
            except httpx2.TransportError:
                assert time.monotonic() < deadline, "the object store does not answer"

    def pause(self) -> None:
        """Stop answering; connections stay open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Answer again."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End the server."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Run an S3 server until the block ends."""
    store = ObjectStore()
    try:
        store.start()
        yield store
    finally:
        store.stop()
