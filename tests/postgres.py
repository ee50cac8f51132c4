"""A real PostgreSQL server for tests, started by the test process on the loopback interface."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_START_S = 60.0
_USER = "nobody"  # PostgreSQL refuses to run as root


def missing() -> str:
    """Return the reason why no PostgreSQL server can be started here; empty if one can."""
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        return f"psycopg is not installed: {error}"
    if _binaries() is None:
        return "PostgreSQL is not installed (apt-get install postgresql)"
    if _is_root() and shutil.which("setpriv") is None:
        return "PostgreSQL does not run as root, and setpriv is not installed"
    return ""


class PostgresServer:
    """A PostgreSQL server with a data folder of its own.

    Args:
        is_synced: True to sync commits to the disk, which protects only against a crash of the
            machine.

    Attributes:
        url: URL of its database.
        socket_url: the same through a Unix socket, which other network namespaces can use, too.
        process_id: id of its main process; 0 while it is stopped.
    """

    def __init__(self, folder: Path, *, is_synced: bool = False) -> None:
        self._is_synced = is_synced
        binaries = _binaries()
        assert binaries is not None
        self._binaries = binaries
        self._data, self._log = folder / "data", folder / "log"
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"postgresql://postgres@127.0.0.1:{self._port}/postgres"
        self._folder = folder
        self.socket_url = f"postgresql://postgres@/postgres?host={folder}&port={self._port}"
        if _is_root():
            shutil.chown(folder, _USER)
        self._run(
            "initdb", "-D", str(self._data), "-U", "postgres", "--auth=trust", "-N", "-E=UTF8"
        )

    def start(self) -> None:
        """Start the server, and wait until it accepts connections."""
        command = [
            *_as_user(),
            str(self._binaries / "postgres"),
            *(
                "-D",
                str(self._data),
                "-k",
                str(self._folder),
                "-h",
                "127.0.0.1",
                "-p",
                str(self._port),
            ),
            *("-c", "max_connections=200", "-c", "shared_buffers=64MB"),
            *("-c", f"fsync={'on' if self._is_synced else 'off'}"),
        ]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/")
        end = time.monotonic() + _START_S
        ready = [str(self._binaries / "pg_isready"), "-h", "127.0.0.1", "-p", str(self._port)]
        while subprocess.run(ready, capture_output=True).returncode != 0:
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < end, self._log.read_text()
            time.sleep(0.05)

    @property
    def process_id(self) -> int:
        return self._process.pid if self._process else 0

    def stop(self, *, kill: bool = False) -> None:
        """Stop the server; with `kill`, without a chance to write anything (SIGKILL)."""
        if self._process is None:
            return
        # SIGQUIT is an immediate shutdown, which also ends the processes of the connections.
        self._process.send_signal(signal.SIGKILL if kill else signal.SIGQUIT)
        self._process.wait(_START_S)
        self._process = None

    def clear(self) -> None:
        """Remove all tables."""
        sql = "DROP SCHEMA public CASCADE; CREATE SCHEMA public"
        self._run("psql", "-q", "-v", "ON_ERROR_STOP=1", "-c", sql, self.url)

    def query(self, sql: str) -> str:
        """Return the rows of a query, one per line, with columns separated by `|`."""
        return self._run("psql", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", sql, self.url)

    def _run(self, program: str, *arguments: str) -> str:
        command = [*_as_user(), str(self._binaries / program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stderr
        return done.stdout


@contextmanager
def postgres_server(*, is_synced: bool = False) -> Iterator[PostgresServer]:
    """Run a PostgreSQL server while the context is open."""
    with tempfile.TemporaryDirectory(prefix="fidelora-postgres-") as folder:
        Path(folder).chmod(0o755)
        server = PostgresServer(Path(folder), is_synced=is_synced)
        server.start()
        try:
            yield server
        finally:
            server.stop()


def _binaries() -> Path | None:
    """Return the folder of the newest installed release."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=_release)
    if found:
        return found[-1].parent
    program = shutil.which("initdb")
    return Path(program).resolve().parent if program else None


def _release(initdb: Path) -> int:
    name = initdb.parts[-3]
    return int(name) if name.isdigit() else 0


def _is_root() -> bool:
    return os.name == "posix" and os.geteuid() == 0


def _as_user() -> list[str]:
    if not _is_root():
        return []
    # The server ends with the test process, even if that one is killed.
    options = [f"--reuid={_USER}", "--regid=nogroup", "--clear-groups", "--pdeathsig=QUIT"]
    return ["setpriv", *options]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
