"""An engine that stays in memory makes the images of commands, with the same bits."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import GOLDEN_JOBS, LORA, MINIATURE_LORA, TINY_BASE

from fidelora import AdapterRef, Engine, Recipe
from fidelora.cli import engines
from fidelora.errors import AdapterNotFoundError, BaseModelNotFoundError, RecipeError, SettingsError
from fidelora.images.write import GeneratedImage
from fidelora.resident import KEEP_VARIABLE, address
from fidelora.resident.address import socket_path
from fidelora.resident.client import ResidentEngine
from fidelora.resident.messages import (
    EngineLostError,
    EngineRefusedError,
    images_of_message,
    images_to_message,
    recipe_of_message,
    recipe_to_message,
)
from fidelora.resident.serve import ResidentServer

SMALL = Recipe(prompt="a ball", base_model=str(TINY_BASE), width=64, height=72, steps=2, seed=7)
DEADLINE_S = 60.0


@pytest.fixture
def folder(monkeypatch) -> Iterator[Path]:
    """A folder with a short name for sockets, in which commands look for engines."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        monkeypatch.setenv("XDG_RUNTIME_DIR", name)
        yield Path(name)


@contextmanager
def serving(engine: Any, path: Path) -> Iterator[ResidentEngine]:
    """Serve an engine on a thread, and yield a connection to it."""
    server, stop = ResidentServer(engine, path), threading.Event()
    thread = threading.Thread(target=server.serve, args=(stop.is_set,))
    thread.start()
    try:
        found = ResidentEngine.connect(path)
        assert found is not None
        yield found
    finally:
        stop.set()
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
        assert not path.exists()


@dataclass
class EndlessEngine:
    """Fake engine that makes steps until the callback raises."""

    auto_dtype: str = "float32"

    def __post_init__(self) -> None:
        self.ended = threading.Event()

    def max_batch(self, recipe: Recipe) -> int:
        return 3

    def generate_batch(self, recipes: Any, on_step: Callable[[Any], None]) -> Any:
        step = 0
        try:
            while True:
                step += 1
                on_step(Step(step))
        finally:
            self.ended.set()


@dataclass(frozen=True)
class Step:
    step: int
    steps: int = 10**9


def test_files_have_the_bytes_of_an_engine_in_this_process(folder):
    recipe = replace(SMALL, adapters=(AdapterRef.from_file(LORA, 0.7),), prompt="x " * 100)
    own = Engine(device="cpu").generate(recipe)
    steps: list[tuple[int, int]] = []
    with serving(Engine(device="cpu"), folder / "e.sock") as resident:
        assert resident.auto_dtype == "float32"
        assert resident.max_batch(recipe) == 1
        found = resident.generate(recipe, lambda one: steps.append((one.step, one.steps)))
    assert steps == [(1, 2), (2, 2)]
    assert np.array_equal(found.pixels, own.pixels)
    assert found.encode() == own.encode()
    assert found.warnings == own.warnings != ()
    assert found.recipe.base_sha256 == own.recipe.base_sha256
    assert found.lora_hashes == own.lora_hashes
    assert found.seconds.keys() == own.seconds.keys()


def test_images_of_a_batch_keep_their_order(folder):
    recipes = [replace(SMALL, fidelity="fast", seed=seed) for seed in (1, 2)]
    own = Engine(device="cpu").generate_batch(recipes)
    with serving(Engine(device="cpu"), folder / "e.sock") as resident:
        found = resident.generate_batch(recipes)
    assert [one.recipe.seed for one in found] == [1, 2]
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(found, own, strict=True))


def test_videos_keep_all_frames_beside_still_images():
    rng = np.random.default_rng(1)
    video, still = (rng.integers(0, 256, shape, np.uint8) for shape in ((5, 8, 6, 3), (4, 2, 3)))
    made = [GeneratedImage.of(one, SMALL, {}, (), {}, {}) for one in (video, still)]
    found = images_of_message(*images_to_message(made), [SMALL, SMALL])
    assert found[0].video is not None
    assert np.array_equal(found[0].video, video)
    assert np.array_equal(found[0].pixels, video[0])
    assert found[1].video is None
    assert np.array_equal(found[1].pixels, still)


def test_errors_keep_their_class_and_do_not_end_the_engine(folder):
    missing = AdapterRef("0" * 64, path=folder / "gone.safetensors")
    with serving(Engine(device="cpu"), folder / "e.sock") as resident:
        with pytest.raises(AdapterNotFoundError, match=r"gone\.safetensors does not exist"):
            resident.generate(replace(SMALL, adapters=(missing,)))
        with pytest.raises(BaseModelNotFoundError, match="was not found"):
            resident.generate(replace(SMALL, base_model=str(folder / "no-base")))
        with pytest.raises(RecipeError) as raised:
            resident.generate_batch([SMALL, replace(SMALL, seed=2)])  # not fast
        assert raised.value.field == ""
        assert resident.generate(SMALL).pixels.shape == (72, 64, 3)


def test_an_interrupted_command_stops_the_engine(folder):
    engine = EndlessEngine()

    def interrupt(_steps: object) -> None:
        raise KeyboardInterrupt

    with serving(engine, folder / "e.sock") as resident:
        with pytest.raises(KeyboardInterrupt):
            resident.generate(SMALL, interrupt)
        assert engine.ended.wait(DEADLINE_S)
        with pytest.raises(EngineLostError):  # the connection has unread answers
            resident.generate(SMALL)


def test_a_command_that_ends_stops_the_engine(folder):
    engine = EndlessEngine()
    with serving(engine, folder / "e.sock") as resident:
        connection = resident._channel
        connection.send({"call": "generate", "recipes": [recipe_to_message(SMALL)]})
        connection.receive()
        connection.close()
        assert engine.ended.wait(DEADLINE_S)


def test_an_engine_that_dies_while_it_computes_raises(folder):
    with serving(EndlessEngine(), folder / "e.sock") as resident:

        def die(_steps: object) -> None:
            resident._channel._connection.shutdown(socket.SHUT_RDWR)

        with pytest.raises(EngineLostError):
            resident.generate(SMALL, die)


def test_a_base_model_that_has_to_be_downloaded_is_refused(folder):
    with serving(EndlessEngine(), folder / "e.sock") as resident:
        for recipe in (
            replace(SMALL, base_model="nobody/nothing"),
            replace(SMALL, vae="nobody/nothing"),
        ):
            with pytest.raises(EngineRefusedError, match="downloaded"):
                resident.generate(recipe)


def test_recipes_are_sent_with_absolute_paths(monkeypatch):
    monkeypatch.chdir(TINY_BASE.parent)
    recipe = replace(
        SMALL, base_model=TINY_BASE.name, adapters=(AdapterRef.from_file(MINIATURE_LORA),)
    )
    received = recipe_of_message(recipe_to_message(recipe))
    assert received.base_model == str(TINY_BASE)
    assert received.adapters == recipe.adapters
    assert received.adapters[0].path == recipe.adapters[0].path
    assert replace(received, base_model=TINY_BASE.name) == recipe
    portable = replace(SMALL, base_model="owner/name")
    assert recipe_of_message(recipe_to_message(portable)).base_model == "owner/name"


def test_an_idle_engine_ends_but_not_while_a_command_is_connected(folder):
    path = folder / "e.sock"
    server = ResidentServer(EndlessEngine(), path, idle_s=0.0)  # type: ignore[arg-type]
    with socket.socket(socket.AF_UNIX) as command:
        command.connect(str(path))
        server._connections = 1  # accepted
        assert not server._is_idle()
        server._connections = 0
    server.serve()
    assert not path.exists()


def test_a_second_engine_is_refused_and_a_dead_ones_socket_replaced(folder):
    path = folder / "e.sock"
    path.write_bytes(b"")  # left by a killed process
    first = ResidentServer(EndlessEngine(), path)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="runs already"):
        ResidentServer(EndlessEngine(), path)  # type: ignore[arg-type]
    first.close()
    ResidentServer(EndlessEngine(), path).close()  # type: ignore[arg-type]


def test_only_an_engine_with_equal_conditions_is_found(folder, monkeypatch):
    path = socket_path("cpu", "none")
    assert path == socket_path("cpu", "none")
    assert path != socket_path("cuda", "none")
    assert path != socket_path("cpu", "model")
    monkeypatch.setenv("UNRELATED", "1")
    monkeypatch.setenv(KEEP_VARIABLE, "3")
    assert path == socket_path("cpu", "none")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert path != socket_path("cpu", "none")
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("name", "value"),
    [("_version", lambda _: "9.9"), ("_code", lambda: ("elsewhere", 1, 2)), ("quota", lambda: 1)],
)
def test_other_versions_code_or_cores_find_no_engine(folder, monkeypatch, name, value):
    path = socket_path("cpu", "none")
    monkeypatch.setattr(address, name, value)
    assert path != socket_path("cpu", "none")


def test_a_folder_that_others_can_use_is_refused(folder):
    (folder / "fidelora").mkdir(mode=0o755)
    with pytest.raises(SettingsError, match="only this user can use"):
        socket_path("cpu", "none")


def test_a_folder_with_a_long_name_is_refused(folder, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder / ("long" * 25)))
    with pytest.raises(SettingsError, match="too long a name"):
        socket_path("cpu", "none")


class LostEngine:
    """Fake connection whose engine has ended, or refuses the image."""

    auto_dtype = "float32"

    def __init__(self, error: Exception) -> None:
        self._error = error

    def generate(self, *_: object) -> GeneratedImage:
        raise self._error


@pytest.mark.parametrize(
    ("error", "is_reported"), [(EngineLostError(), True), (EngineRefusedError("no"), False)]
)
def test_a_command_makes_images_itself_if_the_engine_cannot(capsys, error, is_reported):
    own = Engine(device="cpu")
    maker = engines._WithFallback(LostEngine(error), lambda: own)  # type: ignore[arg-type]
    assert maker.generate(SMALL).pixels.shape == (72, 64, 3)
    assert ("has ended; this command makes" in capsys.readouterr().err) is is_reported
    assert maker._engine is own


def test_commands_start_an_engine_find_it_and_leave_no_process(folder, tmp_path):
    def run(out: str, minutes: str, *python_options: str) -> str:
        environment = os.environ | {KEEP_VARIABLE: minutes, "HF_HUB_OFFLINE": "1"}
        command = [
            *(
                sys.executable,
                *python_options,
                "-m",
                "fidelora",
                "generate",
                "a ball",
                "--steps",
                "2",
            ),
            *("--base-model", TINY_BASE.name, "--size", "64", "--device", "cpu", "-o", out),
        ]
        done = subprocess.run(
            command,
            env=environment,
            cwd=TINY_BASE.parent,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S * 2,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert run(str(tmp_path / "own.png"), "0") == ""
    assert not (folder / "fidelora").exists()
    assert run(str(tmp_path / "first.png"), "5") == ""
    (log,) = (folder / "fidelora").glob("*.log")
    assert "ready on cpu" in log.read_text()
    # Without the variable, a running engine is used, so that this process does not load torch.
    imports = run(str(tmp_path / "second.png"), "", "-X", "importtime").splitlines()
    assert {line.rpartition("|")[2].strip() for line in imports} & {"torch", "numpy"} == {"numpy"}
    own = (tmp_path / "own.png").read_bytes()
    assert own == (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    with log.with_suffix(".lock").open() as lock:
        os.kill(int(lock.read()), signal.SIGTERM)
        fcntl.flock(lock, fcntl.LOCK_EX)  # returns when the process ends
    assert not log.with_suffix(".sock").exists()


@pytest.mark.parametrize("command", ["generate", "replay", "grid"])
def test_commands_use_a_running_engine(folder, fidelora, monkeypatch, tmp_path, command):
    path, picture, out = folder / "e.sock", tmp_path / "picture.png", tmp_path / "out.png"
    Engine(device="cpu").generate(SMALL).save(picture)
    base = ["--base-model", str(TINY_BASE), "--device", "cpu", "-o", str(out)]
    arguments = {
        "generate": ["a ball", "--size", "64x72", "--steps", "2", "--seed", "7", *base],
        "replay": [str(picture), *base],
        "grid": [str(GOLDEN_JOBS / "lora_linear_f32"), "--steps", "6", *base],
    }[command]
    monkeypatch.delenv(KEEP_VARIABLE)
    monkeypatch.setattr(engines, "socket_path", lambda _device, _offload: path)
    monkeypatch.delattr(engines, "make_engine")  # an own engine is an error
    with serving(Engine(device="cpu"), path):
        code, _, error = fidelora(command, *arguments)
    assert code == 0, error
    assert out.is_file()
    if command != "grid":
        assert out.read_bytes() == picture.read_bytes()


def test_serve_local_ends_on_a_signal_also_while_it_computes(folder):
    command = [sys.executable, "-m", "fidelora", "serve", "--local", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ.copy())
    assert process.stdout is not None
    assert "ready on cpu" in process.stdout.readline()
    (path,) = (folder / "fidelora").glob("*.sock")
    resident = ResidentEngine.connect(path)
    assert resident is not None
    with pytest.raises(EngineLostError):  # the command then makes the image itself
        resident.generate(replace(SMALL, steps=150), lambda _: process.send_signal(signal.SIGTERM))
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    assert not list((folder / "fidelora").glob("*.sock"))


def test_of_two_commands_one_starts_an_engine_for_both(folder, monkeypatch, capsys):
    class EndedProcess:
        def __init__(self, *_: object, **__: object) -> None:
            """The engine of the other command runs already."""

        def poll(self) -> int:
            return 2

    with serving(EndlessEngine(), socket_path("cpu", "none")) as resident:
        monkeypatch.setattr(subprocess, "Popen", EndedProcess)
        assert engines._start(socket_path("cpu", "none"), "cpu", "none", 1.0) is not None
        assert resident.max_batch(SMALL) == 3
    assert capsys.readouterr().err == ""


def test_an_engine_that_does_not_start_is_reported(folder, monkeypatch, capsys):
    monkeypatch.setenv(KEEP_VARIABLE, "5")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert isinstance(engines.image_maker("cpu"), Engine)
    assert "The resident engine did not start" in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["soon", "-1", "nan", "inf"])
def test_the_minutes_are_checked(fidelora, monkeypatch, minutes):
    monkeypatch.setenv(KEEP_VARIABLE, minutes)
    code, _, error = fidelora("generate", "a ball", "--base-model", str(TINY_BASE))
    assert code == 2
    assert f"{KEEP_VARIABLE} is '{minutes}'; set it to a number of minutes" in error


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--local", "--port", "1"],
            "--local cannot be combined with --base-model, --host or --port",
        ),
        (["--idle", "5"], "It requires --local"),
        (["--offload", "model"], "It requires --local"),
    ],
)
def test_options_of_the_other_kind_of_server_are_refused(fidelora, options, sentence):
    code, _, error = fidelora("serve", *options)
    assert code == 2
    assert sentence in error
