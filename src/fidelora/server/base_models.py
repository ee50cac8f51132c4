"""Base models that the server is configured to use, identified by their content."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from fidelora.errors import BaseModelError, WeightsFileError
from fidelora.families import get_family
from fidelora.recipe import Recipe
from fidelora.weights.content import ContentHashes
from fidelora.weights.files import BaseFiles, is_complete
from fidelora.weights.locate import is_local


class BaseModels:
    """Content hashes of the server's base models; safe to use from several threads.

    The hash is added to a recipe when its request is accepted. If the base model at the same path
    is replaced while the job is queued, the job cannot use the new one.

    Args:
        server_defaults: recipe fields that the server sets, by model id.
        hashes: content hashes; by default those in the user's cache folder.
    """

    def __init__(
        self,
        server_defaults: Mapping[str, Mapping[str, Any]],
        hashes: ContentHashes | None = None,
    ) -> None:
        self._server_defaults = server_defaults
        self._hashes = hashes or ContentHashes()
        self._found: dict[str, tuple[BaseFiles, str]] = {}
        self._lock = threading.Lock()

    def sha256(self, model: str) -> str:
        """Return the content hash of the base model for a model id; hash its files if they are new.

        The hash is empty for a base model with parts on the hub, because only workers access the
        hub. It is also empty if files are missing or damaged; the workers report the reason.
        """
        recipe = Recipe(prompt="", model=model, **self._server_defaults.get(model, {}))
        base_model = recipe.base_model
        if not is_local(base_model) or not is_complete(base_model, get_family(model)):
            return ""
        with self._lock:
            found = self._found.get(model)
            if found is None or not found[0].is_unchanged():
                try:
                    files = BaseFiles.find(
                        get_family(model),
                        recipe.base_model,
                        variant=recipe.variant,
                        config=recipe.config,
                        decoder=recipe.vae,
                    )
                    files.parameter_counts()  # raises an error if a file is damaged
                    found = files, self._hashes.sha256_of(files)
                except (BaseModelError, WeightsFileError):
                    return ""
                self._found[model] = found
            return found[1]
