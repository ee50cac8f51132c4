"""The base models in memory, limited by a memory budget and identified by their content."""

from __future__ import annotations

import gc
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fidelora.accel import Offload
from fidelora.engine.model import LoadedModel, ModelKey, expected_bytes, load_model
from fidelora.errors import BaseModelChangedError, BaseModelNotFoundError
from fidelora.recipe import LOCATIONS, Recipe, short_name
from fidelora.weights.content import ContentHashes
from fidelora.weights.files import BaseFiles


class LoadedModels:
    """Loads the base models of recipes, and keeps them in memory for later recipes.

    Args:
        device: device on which the models compute.
        offload: as in `load_model`.
        cache_dir: folder for downloads from the hub; None for the default.
        budget_bytes: maximum memory for the weights of all models. The least recently used model
            is dropped first. The one in use stays loaded even if it exceeds the budget.
        hashes: content hashes of base models.
    """

    def __init__(
        self,
        device: torch.device,
        offload: Offload,
        *,
        cache_dir: Path | None,
        budget_bytes: int,
        hashes: ContentHashes,
    ) -> None:
        self._device = device
        self._offload = offload
        self._cache_dir = cache_dir
        self._budget_bytes = budget_bytes
        self._hashes = hashes
        self.models: OrderedDict[ModelKey, LoadedModel] = (
            OrderedDict()
        )  # the most recently used one at the end

    @property
    def latest(self) -> LoadedModel | None:
        """The most recently used model; None if none is loaded."""
        return next(reversed(list(self.models.values())), None)

    def ids(self) -> tuple[str, ...]:
        """Return the ids of the model families, the most recently used one first."""
        return tuple(dict.fromkeys(key.model for key in reversed(list(self.models))))

    def get(self, recipe: Recipe) -> LoadedModel:
        """Return the base model of `recipe`; load it if it is not loaded or its files changed.

        Raises:
            BaseModelError, WeightsFileError: a file is missing, damaged or unsuitable.
            BaseModelChangedError: the base model does not have the recipe's `base_sha256`.
            DeviceError: the recipe is `fast`, which this device or family does not support.
        """
        key = ModelKey.of(recipe)
        model = self.models.get(key)
        if model is None or not model.files.is_unchanged():
            key, files = self._find(key, recipe.base_sha256)
            model = self.models.get(key)
        if model is None or not model.files.is_unchanged():
            _check(recipe, self._hashes.cached_sha256_of(files))
            self.models.pop(key, None)
            self._make_room(key, files)
            gc.collect()  # offloading hooks form reference cycles that keep freed models alive
            model = self.models[key] = self._load(key, files)
        _check(recipe, model.sha256)
        self.models.move_to_end(key)
        return model

    def _find(self, key: ModelKey, sha256: str) -> tuple[ModelKey, BaseFiles]:
        """Return the key by which the files of a base model were found, and the files.

        A recipe from an image contains only the short name of its base model. If this name cannot
        be found, the location where a base model with the hash `sha256` was last used is tried. The
        returned key then has this location.
        """
        try:
            return key, key.find_files(self._cache_dir)
        except BaseModelNotFoundError as error:
            if not sha256:
                raise
            location = self._hashes.location(sha256)
            if location is None:
                raise BaseModelNotFoundError(
                    f"{error} The recipe's base model has sha256 {sha256[:12]} and was not used on "
                    "this machine before."
                ) from error
            key = key._replace(**location)
            return key, key.find_files(self._cache_dir)

    def _load(self, key: ModelKey, files: BaseFiles) -> LoadedModel:
        # Hashed in a thread while the model loads, because hashing new files takes seconds, mostly
        # waiting for the disk.
        with ThreadPoolExecutor(1, "fidelora-hash") as thread:
            sha256 = thread.submit(self._hashes.sha256_of, files)
            model = load_model(key, files, self._device, offload=self._offload)
            model.sha256 = sha256.result()
        location = {name: getattr(key, name) for name in LOCATIONS}
        self._hashes.remember_location(model.sha256, location)
        return model

    def _make_room(self, key: ModelKey, files: BaseFiles) -> None:
        """Drop base models before loading another, to stay within the budget while it loads."""
        needed = expected_bytes(key, files) if self.models and self._budget_bytes else 0
        while self.models:
            used = sum(model.size_bytes for model in self.models.values())
            if used + needed <= self._budget_bytes:
                return
            self.models.popitem(last=False)


def _check(recipe: Recipe, sha256: str | None) -> None:
    if recipe.base_sha256 and sha256 and recipe.base_sha256 != sha256:
        raise BaseModelChangedError(
            f"The recipe needs the base model {short_name(recipe.base_model)} with sha256 "
            f"{recipe.base_sha256[:12]}, but the one found here has sha256 {sha256[:12]}; "
            "use the base model that the image was made with."
        )
