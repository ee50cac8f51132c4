"""The base models that the page offers. Does not import Gradio."""

from __future__ import annotations

from fidelora.families import Family, get_family
from fidelora.recipe import Recipe, short_name
from fidelora.server.context import ServerContext
from fidelora.server.page.html import escape


def served_families(context: ServerContext) -> list[Family]:
    """Return the families whose base models the server was started with, the default one first.

    The API also accepts the other families, with their base models from the hub. The page does not
    offer them, because a click would download gigabytes.
    """
    return [get_family(model) for model in context.configured_models]


def _base_model(context: ServerContext, model: str) -> str:
    recipe = Recipe(prompt="", model=model, **context.server_defaults.get(model, {}))
    return recipe.base_model


def base_name(context: ServerContext, model: str) -> str:
    """Return the short name of the server's base model for a family."""
    return short_name(_base_model(context, model))


def base_side(context: ServerContext, family: Family) -> int:
    """Return the width and height, in pixels, that the server's base model was trained at."""
    return family.size_of(_base_model(context, family.id))


def bases_line(context: ServerContext) -> str:
    """Return a paragraph with the name and family of each base model."""
    bases = ", ".join(
        f"<strong>{escape(base_name(context, family.id))}</strong> ({escape(family.title)})"
        for family in served_families(context)
    )
    return f'<p class="bases">Base model: {bases}</p>'
