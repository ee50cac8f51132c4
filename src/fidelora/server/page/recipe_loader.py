"""Handling of files dropped onto the *Make* tab: images with recipes, and LoRAs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from fidelora.errors import FideloraError, ImageRecordError, UsageError
from fidelora.families import get_family
from fidelora.images.read import read_origin
from fidelora.recipe import Recipe
from fidelora.server.context import ServerContext
from fidelora.server.middleware import MAX_IMAGE_BYTES
from fidelora.server.page.bases import served_families
from fidelora.server.page.events import IMMEDIATE
from fidelora.server.page.form import MAX_LORAS, differences, first_recipe, form_for_recipe
from fidelora.server.page.handlers import for_visitor
from fidelora.server.page.html import notice
from fidelora.server.page.lora_list import LoraList
from fidelora.server.page.make_form import MakeForm
from fidelora.server.page.make_prompts import PromptInputs
from fidelora.server.page.make_settings import IMAGE_SUFFIXES, SettingsInputs
from fidelora.server.page.uploads import LORA_SUFFIX, add_lora, refuse_larger
from fidelora.server.submit import defaults_for
from fidelora.texts import listed


class RecipeLoader:
    """Event handlers that load recipes into the form and store dropped LoRAs."""

    def __init__(self, context: ServerContext, lora_list: LoraList, form: MakeForm) -> None:
        self._context = context
        self._lora_list = lora_list
        self._form = form

    def listen(self, prompts: PromptInputs, settings: SettingsInputs) -> None:
        """Connect the drop zone and the upload button; both are empty again after each upload."""
        form = self._form
        loaded = [prompts.loaded, prompts.loras, *form.lora_outputs]
        prompts.upload.upload(
            for_visitor(self.add_loras),
            [prompts.upload, *form.lora_inputs],
            [prompts.upload, *loaded],
            **IMMEDIATE,
        )
        settings.drop.upload(
            for_visitor(self.take),
            [settings.drop, *form.lora_inputs],
            [settings.drop, *form.outputs],
            **IMMEDIATE,
        )

    def add_loras(self, files: Sequence[str] | None, *values: Any) -> list[Any]:
        """Store LoRAs and choose them in the form; the files are removed."""
        added, problems = self._store([Path(file) for file in files or []])
        return [None, self._upload_message(added, problems), *self._form.add_loras(added, *values)]

    def take(self, files: Sequence[str] | None, *values: Any) -> list[Any]:
        """Store dropped LoRAs and choose them, or load the recipe of a dropped image."""
        paths = [Path(file) for file in files or []]
        if others := [path for path in paths if not _can_take(path)]:
            for path in paths:
                path.unlink(missing_ok=True)
            return [None, *self._form.message(notice(_refusal(others[0]), "error"))]
        images = [path for path in paths if path.suffix.lower() != LORA_SUFFIX]
        if len(images) == 1 == len(paths):
            return [None, *self.load_image(images[0])]
        added, problems = self._store([path for path in paths if path not in images])
        if images:
            problems.append("Drop an image alone to load its recipe.")
        choices, handled, *sliders, trigger = self._form.add_loras(added, *values)
        form = self._form
        named = dict(zip(map(id, form.lora_outputs), [handled, *sliders, trigger], strict=True))
        named[id(form.inputs[0])] = choices
        named[id(form.outputs[0])] = self._upload_message(added, problems)
        return [None, *(named.get(id(output), gr.skip()) for output in form.outputs)]

    def load_image(self, path: Path) -> list[Any]:
        """Return the updates that load an image's recipe into the form."""
        try:
            refuse_larger(path, MAX_IMAGE_BYTES)
            origin = read_origin(path.read_bytes(), path.name)
            if origin.recipe is None:
                raise ImageRecordError(
                    f"{path.name} contains no Fidelora recipe; choose an image made by Fidelora."
                )
            return self.show_recipe(origin.recipe, origin.format)
        except FideloraError as error:
            return self._form.message(notice(error, "error"))

    def show_recipe(self, recipe: Recipe, image_format: str) -> list[Any]:
        """Return the updates that load a recipe into the form, and a message about the result.

        Raises:
            UsageError: the form cannot show the recipe, or a LoRA is missing.
        """
        served = served_families(self._context)
        if recipe.model not in [family.id for family in served]:
            names = ", ".join(family.title for family in served)
            raise UsageError(
                f"The image was made with {get_family(recipe.model).title}; "
                f"this server's base models are for {names}."
            )
        found = [(adapter, self._lora_list.path_of(adapter)) for adapter in recipe.adapters]
        paths = [path for _, path in found if path is not None]
        if len(paths) < len(found):
            missing = ", ".join(
                f"{adapter.name or 'unnamed'} (sha256 {adapter.sha256})"
                for adapter, path in found
                if path is None
            )
            raise UsageError(f"The image needs LoRAs that are not on this server: {missing}.")
        if len(paths) > MAX_LORAS:
            raise UsageError(
                f"The image uses {len(paths)} LoRAs; this form supports up to {MAX_LORAS}."
            )
        form = form_for_recipe(recipe, paths, image_format)
        adapters = [self._lora_list.cached_ref(path) for path in paths]
        here = first_recipe(form, adapters, defaults_for(self._context, recipe.model, adapters))
        if changes := differences(recipe, here):
            message = notice(
                "Settings loaded, but this server would make a different image: "
                f"{'; '.join(changes)}.",
                "error",
            )
        else:
            message = notice("Settings loaded; this server makes the same image again.", "good")
        return self._form.show(form, message)

    def _store(self, files: Sequence[Path]) -> tuple[list[str], list[str]]:
        """Store LoRAs; return their paths for requests, and the messages of refused ones."""
        added: list[str] = []
        problems: list[str] = []
        for file in files:
            try:
                added.append(add_lora(self._context, file))
            except FideloraError as error:
                problems.append(str(error))
            finally:
                file.unlink(missing_ok=True)
        return added, problems

    def _upload_message(self, added: Sequence[str], problems: Sequence[str]) -> str:
        """Return the message after an upload: refused files, and the models that each LoRA fits."""
        parts = [notice(problem, "error") for problem in problems]
        several = len(self._context.configured_models) > 1
        fitting: dict[str, list[str]] = {}
        for path in added:
            fit = self._lora_list.fit(path)
            if fit.problem:
                parts.append(notice(f"{path} was stored. {fit.problem}", "error"))
                continue
            titles = listed([get_family(model).title for model in fit.models])
            ending = f" (for {titles})" if several and titles else ""
            fitting.setdefault(ending, []).append(path)
        for ending, paths in fitting.items():
            parts.append(notice(f"Added {', '.join(paths)}{ending}.", "good"))
        return "".join(parts)


def _can_take(path: Path) -> bool:
    return path.suffix.lower() in (LORA_SUFFIX, *IMAGE_SUFFIXES)


def _refusal(path: Path) -> str:
    """Return a sentence about a dropped file that is neither a LoRA nor an image."""
    if path.suffix.lower() == ".zip":
        return (
            f"{path.name} is a zip archive. Unpack it and drop the .safetensors file of the LoRA; "
            "drop the zip of a training run on the tab Match."
        )
    return f"{path.name} cannot be used here. Drop a LoRA (.safetensors), or an image or video."
