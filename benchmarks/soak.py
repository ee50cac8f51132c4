"""`make soak`: hours of random requests, cancels, uploads, disconnects and kills on one server.

    python -m benchmarks.soak [--minutes 120] [--seed 0]

Two thirds of the time are without kills, so that memory and file handles can be compared over the
life of one process. Prints one line a minute and the result at the end; exits with 1 if a request
was lost, an image differs from the first one with the same recipe, or a file handle leaks.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file, save
from tests.faults.answers import try_submit
from tests.faults.test_kills import workers_of
from tests.server.serve_support import Server
from tests.support import LORA

MAX_QUEUED = 40
"""Maximum number of unfinished requests."""
ENDS = ("succeeded", "failed", "canceled")


@dataclass
class Memory:
    """Samples of one process: images made so far, memory without mapped files (MiB), handles."""

    samples: list[tuple[int, float, int]] = field(default_factory=list)

    def add(self, images: int, process_id: int) -> None:
        status = Path(f"/proc/{process_id}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        mebibytes = int(fields["RssAnon"].split()[0]) / 1024
        handles = len(list(Path(f"/proc/{process_id}/fd").iterdir()))
        self.samples.append((images, mebibytes, handles))

    @property
    def slope(self) -> float:
        """MiB per 1,000 images, over the second half of the samples; 0 for fewer than three."""
        late = self.samples[len(self.samples) // 2 :]
        if len(late) < 2 or late[0][0] == late[-1][0]:
            return 0.0
        images, mebibytes, _ = zip(*late, strict=True)
        return statistics.linear_regression(images, mebibytes).slope * 1000

    @property
    def more_handles(self) -> int:
        """Median of the handles at the end, minus that in the middle."""
        handles = [sample[2] for sample in self.samples]
        quarter = max(1, len(handles) // 4)
        middle = handles[2 * quarter : 3 * quarter] or handles[:1]
        return round(statistics.median(handles[-quarter:]) - statistics.median(middle))


class Soak:
    """A server, and the requests that were sent to it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.data = folder
        self.chance = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.pending: dict[str, tuple[Any, ...]] = {}
        self.first_pixels: dict[tuple[Any, ...], bytes] = {}
        self.wrong: list[str] = []
        (folder / "loras").mkdir()
        shutil.copyfile(LORA, folder / "loras" / "sks.safetensors")
        self.server = Server(folder, FIDELORA_KEEP_REQUESTS="500")
        self.server.ready()

    def act(self, *, with_kills: bool) -> None:
        """Perform one random action."""
        actions: dict[Any, float] = {
            self.submit: 60,
            self.check_ended: 25,
            self.cancel: 1,
            self.upload: 1,
            self.listen: 2,
        }
        if with_kills:
            actions |= {self.kill_worker: 0.1, self.kill_server: 0.05}
        (action,) = self.chance.choices(list(actions), list(actions.values()))
        self.counts[action.__name__] += 1
        action()

    def submit(self) -> None:
        if len(self.pending) >= MAX_QUEUED:
            self.check_ended()
            time.sleep(0.1)  # leaves the processors to the worker
            return
        fields = {
            "seed": self.chance.randrange(8),
            "sample_steps": self.chance.choice((2, 4)),
            "width": self.chance.choice((64, 128)),
        }
        answer = try_submit(self.server, **fields)
        if answer.request_id:
            self.pending[answer.request_id] = tuple(fields.values())
        else:
            self.counts[f"refused with {answer.status}"] += 1

    def check_ended(self) -> None:
        """Check the requests that have ended."""
        for request_id in list(self.pending)[:MAX_QUEUED]:
            status = self.server.status(request_id)
            if status["status"] not in ENDS:
                break
            self.counts[status["status"]] += 1
            recipe = self.pending.pop(request_id)
            if status["status"] == "succeeded":
                with Image.open(self.data / "outputs" / f"{request_id}_output_0.png") as image:
                    pixels = np.asarray(image).tobytes()
                if self.first_pixels.setdefault(recipe, pixels) != pixels:
                    self.wrong.append(f"{request_id} differs from the first image of {recipe}")
            elif status["status"] == "failed":
                self.wrong.append(f"{request_id} failed: {status['error']}")

    def cancel(self) -> None:
        if self.pending:
            request_id = self.chance.choice(list(self.pending))
            self.server.call(f"/v1/requests/{request_id}", method="DELETE")

    def upload(self) -> None:
        """Upload a LoRA and delete it."""
        name = f"{self.chance.randrange(10**6)}.safetensors"
        boundary = "soak"
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"'
        content = save(load_file(LORA), {"name": name})  # other bytes than any LoRA in use
        body = f"{head}\r\n\r\n".encode() + content + f"\r\n--{boundary}--\r\n".encode()
        request = urllib.request.Request(
            f"{self.server.url}/v1/loras",
            body,
            {"Content-Type": f"multipart/form-data; boundary={boundary}"},
        )
        delete = urllib.request.Request(f"{self.server.url}/v1/loras/{name}", method="DELETE")
        for call in (request, delete):
            with urllib.request.urlopen(call, timeout=60):
                pass

    def listen(self) -> None:
        """Open the event stream of a request, read one byte, and disconnect."""
        if self.pending:
            request_id = self.chance.choice(list(self.pending))
            url = f"{self.server.url}/v1/requests/{request_id}/events"
            with urllib.request.urlopen(url, timeout=60) as stream:
                stream.read(1)

    def kill_worker(self) -> None:
        for worker in workers_of(self.server):
            os.kill(worker, signal.SIGKILL)

    def kill_server(self) -> None:
        self.server.kill()
        self.server = Server(self.data, FIDELORA_KEEP_REQUESTS="500")

    def finish(self) -> None:
        """Wait for all requests."""
        end = time.monotonic() + 300
        while self.pending and time.monotonic() < end:
            self.check_ended()
            time.sleep(0.05)
        self.wrong += [f"{request_id} did not end" for request_id in self.pending]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), options.seed)
        server, worker = Memory(), Memory()
        start = time.monotonic()
        calm_s, all_s = 40 * options.minutes, 60 * options.minutes
        next_sample = next_line = 0.0
        try:
            while (passed := time.monotonic() - start) < all_s:
                try:
                    soak.act(with_kills=passed > calm_s)
                except (urllib.error.URLError, OSError) as error:
                    if passed <= calm_s:
                        soak.wrong.append(f"a call failed: {error}")
                if passed <= calm_s and passed >= next_sample:
                    images = soak.counts["succeeded"]
                    server.add(images, soak.server.process.pid)
                    worker.add(images, workers_of(soak.server)[0])
                    next_sample = passed + calm_s / 100
                if passed >= next_line:
                    print(f"{passed / 60:6.1f} min  {dict(soak.counts)}", flush=True)
                    next_line = passed + 60
            soak.finish()
        finally:
            soak.server.close()
    for name, memory in (("server", server), ("worker", worker)):
        print(
            f"{name}: {memory.samples[0][1]:.0f} to {memory.samples[-1][1]:.0f} MiB, "
            f"{memory.slope:+.2f} MiB per 1,000 images, {memory.more_handles:+d} file handles"
        )
        if memory.more_handles > 2:
            soak.wrong.append(f"the {name} leaks file handles")
    print(f"{dict(soak.counts)}; {len(soak.first_pixels)} different recipes")
    print("\n".join(soak.wrong) or "nothing lost, nothing different")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
