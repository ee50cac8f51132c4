"""One server for all hostile requests of a module; its secrets must not leak."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.faults.fault_support import FaultServer, recorded_logs


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    server = FaultServer(tmp_path_factory.mktemp("faults"))
    with recorded_logs(server.logs):
        yield server
    server.close()
    server.check_secrets()
