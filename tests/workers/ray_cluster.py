"""A Ray cluster on the loopback interface: a head without CPUs, and two raylets with two each.

    unshare --map-root-user --net python tests/workers/ray_cluster.py

Runs in a network namespace of its own, because Ray replaces 127.0.0.1 by another address of the
machine if there is one. Prints one line of JSON per command from stdin: `start` and the arguments
of `fidelora worker` start a process in the namespace, `stop PROCESS_ID` sends SIGTERM and waits for
it, and `raylet` adds a raylet. The cluster ends when stdin is closed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

_MEMORY_BYTES = 80_000_000  # smallest object store that Ray accepts, approximately


def main() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    from ray.cluster_utils import Cluster

    memory: dict[str, Any] = {"object_store_memory": _MEMORY_BYTES}
    head: dict[str, Any] = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head | memory)
    launchers: dict[int, subprocess.Popen[bytes]] = {}
    try:

        def add_raylet() -> int:
            node = cluster.add_node(num_cpus=2, **memory)
            return int(node.all_processes["raylet"][0].process.pid)

        _answer({"raylets": [add_raylet() for _ in range(2)]})
        for line in sys.stdin:
            command, *arguments = json.loads(line)
            if command == "start":
                options = ["worker", "--ray", cluster.address, *arguments]
                process = subprocess.Popen([sys.executable, "-m", "fidelora", *options])
                launchers[process.pid] = process
                _answer({"pid": process.pid})
            elif command == "raylet":
                _answer({"pid": add_raylet()})
            else:
                process = launchers[int(arguments[0])]
                if command == "stop":
                    process.terminate()
                else:
                    process.kill()
                _answer({"code": process.wait()})
    finally:
        for process in launchers.values():
            process.kill()
            process.wait()
        cluster.shutdown()


def _answer(values: dict[str, Any]) -> None:
    # Ray prints to stdout, too.
    os.write(3, json.dumps(values).encode() + b"\n")


if __name__ == "__main__":
    main()
