"""The process of a resident engine: listens on a socket and makes the images of commands."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fidelora.engine.engine import Engine, Progress
from fidelora.errors import FideloraError, SettingsError
from fidelora.families import get_family
from fidelora.recipe import Recipe
from fidelora.resident.messages import (
    Channel,
    EngineLostError,
    error_to_message,
    images_to_message,
    recipe_of_message,
)
from fidelora.weights.locate import is_downloaded, is_portable

log = logging.getLogger(__name__)

_POLL_S = 0.5  # seconds between two checks whether the engine has been idle for long enough


class ResidentServer:
    """Serves one engine to the commands of this user until it has been idle for a given time.

    Several commands take turns, because the engine makes one image or batch at a time.

    Args:
        path: socket, in a folder that only this user can use.
        idle_s: seconds without a connection after which `serve` returns; None to serve without end.

    Raises:
        SettingsError: another process serves this engine already.
    """

    def __init__(self, engine: Engine, path: Path, idle_s: float | None = None) -> None:
        self._engine = engine
        self._path = path
        self._idle_s = idle_s
        self._connections = 0
        self._last_use = time.monotonic()
        self._state = threading.Lock()  # guards the two fields above
        self._lock_file = path.with_suffix(".lock").open("a+")
        try:
            # Held until the process ends, even if it is killed, so an old socket can be replaced.
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.close()
            raise SettingsError(
                "A resident engine with this device, offload mode and environment runs already; "
                "commands use it."
            ) from None
        self._lock_file.truncate(0)
        self._lock_file.write(f"{os.getpid()}\n")  # shows users which process it is
        self._lock_file.flush()
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(_POLL_S)

    def serve(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Serve commands until the engine has been idle for `idle_s`.

        Args:
            should_stop: called every half second; True ends the loop.
        """
        try:
            while not should_stop() and not self._is_idle():
                try:
                    connection, _ = self._listener.accept()
                except TimeoutError:
                    continue
                with self._state:
                    self._connections += 1
                connection.settimeout(None)
                threading.Thread(target=self._run, args=(connection,), daemon=True).start()
        finally:
            self.close()

    def close(self) -> None:
        """Stop listening, and remove the socket."""
        self._listener.close()
        self._path.unlink(missing_ok=True)
        self._lock_file.close()

    def _is_idle(self) -> bool:
        with self._state:
            if self._idle_s is None or self._connections:
                return False
            return time.monotonic() - self._last_use >= self._idle_s

    def _run(self, connection: socket.socket) -> None:
        channel = Channel(connection)
        try:
            channel.send({"auto_dtype": self._engine.auto_dtype})
            while True:
                self._answer(channel, channel.receive()[0])
        except EngineLostError:
            pass  # the command has ended
        except Exception:
            # The command makes the image itself, and reports the error.
            log.exception("an image could not be made")
        finally:
            channel.close()
            with self._state:
                self._connections -= 1
                self._last_use = time.monotonic()

    def _answer(self, channel: Channel, message: dict[str, Any]) -> None:
        try:
            if message["call"] == "max_batch":
                recipe = recipe_of_message(message)
                channel.send({"max_batch": self._engine.max_batch(recipe)})
                return
            recipes = [recipe_of_message(one) for one in message["recipes"]]
            if reason := _refusal(recipes[0]):
                channel.send({"refused": reason})
                return

            def on_step(progress: Progress) -> None:
                channel.send({"step": progress.step, "steps": progress.steps})

            images = self._engine.generate_batch(recipes, on_step)
        except EngineLostError:
            raise
        except FideloraError as error:
            channel.send(error_to_message(error))
            return
        channel.send(*images_to_message(images))


def _refusal(recipe: Recipe) -> str:
    """Return the reason why the command has to make an image itself; empty if there is none."""
    with suppress(FideloraError):
        family = get_family(recipe.model)
        names = {recipe.base_model: family.parts}
        if recipe.vae:
            names[recipe.vae] = (family.part("decoder"),)
        if not all(
            is_downloaded(name, parts, variant=recipe.variant)
            for name, parts in names.items()
            if is_portable(name)
        ):
            return "The base model has to be downloaded first."  # the command shows the progress
    return ""
