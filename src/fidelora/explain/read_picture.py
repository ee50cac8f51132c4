"""Read how a picture was made from its file. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fidelora.errors import ImageRecordError, RecipeError
from fidelora.explain.comfyui_graph import read_graph
from fidelora.explain.json_programs import (
    objects_of,
    read_fooocus,
    read_invokeai,
    read_novelai,
    read_swarmui,
)
from fidelora.explain.reading import Reading, UsedLora, UsedModel
from fidelora.explain.web_ui_text import read_web_ui_text
from fidelora.images.other_programs import name_of_program
from fidelora.images.read import RECORD_KEY, read_texts, recipe_of
from fidelora.recipe import Recipe
from fidelora.texts import read_json

_MAX_CHARACTERS = 2**20
"""Longest text field that is read; graphs of nodes can be long."""


def read_picture(content: bytes, name: str = "The picture") -> Reading:
    """Return the settings in the file of a picture; an empty reading if it contains none.

    Args:
        content: contents of a PNG, JPEG or WebP file.
        name: name of the picture for messages.

    Raises:
        ImageRecordError: not an image.
    """
    texts = {
        key: text
        for key, text in read_texts(content, name).texts.items()
        if len(text) <= _MAX_CHARACTERS
    }
    if RECORD_KEY in texts and (own := _of_record(texts[RECORD_KEY])) is not None:
        return own
    objects = dict(objects_of(texts, read_json))
    parameters = texts.get("parameters", "")
    settings = objects.get("parameters", {})
    if isinstance(swarm := settings.get("sui_image_params"), dict):
        return read_swarmui(swarm, str(swarm.get("swarm_version", "")))
    if "invokeai_metadata" in objects:
        return read_invokeai(objects["invokeai_metadata"])
    if "fooocus_scheme" in texts or "performance" in settings:
        if settings:
            return read_fooocus(settings)
        return read_web_ui_text(parameters, program="Fooocus")
    if settings.get("Software") == "NovelAI":  # in WebP files
        comment = dict(objects_of({"Comment": str(settings.get("Comment", ""))}, read_json))
        return read_novelai(comment.get("Comment", {}), str(settings.get("Source", "")))
    if texts.get("Software") == "NovelAI" or texts.get("Source", "").startswith("NovelAI"):
        return read_novelai(objects.get("Comment", {}), texts.get("Source", ""))
    for key in ("prompt", "parameters"):
        if isinstance(objects.get(key), dict) and (graph := read_graph(objects[key])) is not None:
            return graph
    if "workflow" in objects:
        sentence = (
            "The picture contains ComfyUI's workflow only in the form for its editor, which is not "
            "read."
        )
        return Reading("ComfyUI", unsupported=(sentence,))
    if parameters.strip() and "Steps: " in parameters:
        # A1111 stores what its tab Extras did to a picture in a field of its own.
        added = texts.get("postprocessing", "")
        return read_web_ui_text(f"{parameters}, {added}" if added else parameters)
    if program := name_of_program(texts):
        sentence = f"The picture was made with {program}. Its settings are not read."
        return Reading("unknown", unsupported=(sentence,))
    return Reading("unknown")


def _of_record(text: str) -> Reading | None:
    """Return the settings in Fidelora's own record; None if it cannot be used."""
    try:
        record = read_json(text)
        recipe, _ = recipe_of(record)
    except (ValueError, KeyError, ImageRecordError, RecipeError):
        return None
    return reading_of_recipe(recipe)


def reading_of_recipe(recipe: Recipe) -> Reading:
    """Return the settings of a recipe."""
    loras = tuple(
        UsedLora(ref.name, ref.multiplier, ref.multiplier, ref.sha256)
        for ref in recipe.adapters
        if ref.word is None
    )
    return Reading(
        program="Fidelora",
        prompt=recipe.prompt,
        negative_prompt=recipe.negative_prompt,
        steps=recipe.steps,
        guidance_scale=recipe.guidance_scale,
        guidance_rescale=recipe.guidance_rescale,
        seed=recipe.seed,
        width=recipe.width,
        height=recipe.height,
        sampler=recipe.sampler,
        scheduler=recipe.timestep_spacing,
        eta=recipe.eta,
        emphasis="plain" if recipe.emphasis == "none" else recipe.emphasis,
        clip_skip=1,
        noise_source="cpu",
        loras=loras,
        base_model=UsedModel(recipe.base_model, _checkpoint_hash(recipe)),
        vae=UsedModel(recipe.vae),
        dtype=recipe.dtype,
    )


def _checkpoint_hash(recipe: Recipe) -> str:
    """Return the sha256 of the base model if it is one file; otherwise "".

    The hash of a folder, or of a base model with another VAE or configuration, is that of a list of
    hashes (`ContentHashes.sha256_of`), which no file has.
    """
    is_file = recipe.base_model.lower().endswith(".safetensors")
    return recipe.base_sha256 if is_file and not (recipe.vae or recipe.config) else ""


def with_options(reading: Reading, options: Mapping[str, Any]) -> Reading:
    """Return the reading with settings that the user gave by hand; None leaves one unchanged."""
    given = {name: value for name, value in options.items() if value is not None}
    return Reading(**{**vars(reading), **given})
