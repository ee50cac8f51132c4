"""Time of a look-up of an API key, and of a revocation at another server.

    python benchmarks/key_lookups.py [--keys 100] [--revocations 50]

Starts a PostgreSQL server on this machine. Prints the median and the 99th percentile of a look-up:
in a file, in the database, and in the database with the cache that servers use; then the time from
the commit of a revocation until a second server refuses the key.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.postgres import postgres_server

from fidelora.jobs.api_keys import ApiKeys, FileKeys
from fidelora.jobs.client_tables import MAX_AGE_S, DatabaseKeys
from fidelora.jobs.transactions import Database

LOOK_UPS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, default=100)
    parser.add_argument("--revocations", type=int, default=50)
    options = parser.parse_args()
    with postgres_server() as server, tempfile.TemporaryDirectory() as folder:
        first, second = Database(server.url), Database(server.url)
        uncached = DatabaseKeys(first)
        secrets = [uncached.add(f"key {number}") for number in range(options.keys)]
        here, there = (DatabaseKeys(each, max_age_s=MAX_AGE_S) for each in (first, second))
        time.sleep(1.0)  # until both are connected for notifications
        file = FileKeys(Path(folder) / "api_keys.json")
        of_file = [file.add(f"key {number}") for number in range(options.keys)]
        _print("file", file, of_file[0])
        _print("database", uncached, secrets[0])
        _print(f"database, cached for {MAX_AGE_S:g} s", here, secrets[0])
        times = []
        for number in range(min(options.revocations, options.keys)):
            assert there.find(secrets[number]) is not None
            here.remove(f"key {number}")
            times.append(_seconds(lambda: _until_unknown(there, secrets[number])))  # noqa: B023
        print(
            f"revocation at another server: median {statistics.median(times) * 1e3:.1f} ms, "
            f"longest {max(times) * 1e3:.1f} ms of {len(times)}"
        )
        first.close()
        second.close()


def _print(name: str, keys: ApiKeys, secret: str) -> None:
    times = sorted(_seconds(lambda: keys.find(secret)) for _ in range(LOOK_UPS))
    print(
        f"{name}: median {statistics.median(times) * 1e6:.1f} us, "
        f"99th percentile {times[LOOK_UPS * 99 // 100] * 1e6:.1f} us"
    )


def _until_unknown(keys: ApiKeys, secret: str) -> None:
    while keys.find(secret) is not None:
        time.sleep(0.0001)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
