"""What requests mean: from a body to complete recipes, and from recipes back to a body."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from fidelora.api.requests import InferenceRequest, PromptItem
from fidelora.errors import RecipeError, RequestError, RequestFieldError, UnknownModelError
from fidelora.families import Family, all_families, get_family
from fidelora.recipe import AdapterRef, Recipe, replace_trigger

DEFAULT_SIZE = 1024
"""Pixels of a side that a request leaves out: the documented API's, not the model's own."""

_OF_OTHER_MODELS = ("fps", "resolution", "ctrl_img", "ctrl_img_1", "ctrl_img_2", "ctrl_img_3")

_FIELD_OF = {"steps": "sample_steps", "negative_prompt": "neg", "negative_prompt_2": "neg_2"}
"""What a field of a recipe is called in a prompt item, where the names differ."""


def check_request(request: InferenceRequest, *, needs_lora: bool = True) -> Family:
    """See that the model is known and can use every field of the request.

    Args:
        needs_lora: whether there has to be one, as in the documented API.

    Raises:
        RequestError: with the code of the API and what a client needs to mend it.
    """
    try:
        spec = get_family(request.model)
    except UnknownModelError as error:
        supported = list(all_families())
        raise RequestError(
            str(error), code="MODEL_NOT_FOUND", details={"supported_models": supported}
        ) from error
    if needs_lora and not request.loras:
        raise RequestError("At least one LoRA is required.", code="LORA_FILE_REQUIRED")
    if any(lora.transformer for lora in request.loras):
        message = f"{spec.id} has one transformer: a LoRA of it has no `transformer`."
        raise RequestError(
            message, code="MOE_FORMAT_NOT_SUPPORTED", details={"field": "transformer"}
        )
    for place, field in _unusable_fields(request):
        message = f"{place}{field} means nothing to {spec.id}; leave it out."
        raise RequestError(
            message, code="FIELD_NOT_SUPPORTED", details={"field": f"{place}{field}"}
        )
    for index, item in enumerate(request.prompts):
        if isinstance(item.network_multiplier, list) and len(item.network_multiplier) != len(
            request.loras
        ):
            message = f"prompts[{index}].network_multiplier has {len(item.network_multiplier)} numbers for {len(request.loras)} LoRAs."
            raise RequestError(
                message,
                code="MULTIPLIERS_DO_NOT_MATCH",
                details={"field": f"prompts[{index}].network_multiplier"},
            )
    return spec


def recipes_of(
    request: InferenceRequest,
    adapters: Sequence[AdapterRef],
    base: Mapping[str, Any],
    draw_seed: Callable[[], int],
) -> tuple[Recipe, ...]:
    """One complete recipe for each prompt.

    Args:
        request: one that `check_request` has passed.
        adapters: what each of its LoRAs is, in order; their own multipliers are not used.
        base: the recipe fields that the server decides: `base_model`, dtypes, `noise`, ..., and `fidelity` if the request does not.
        draw_seed: called for each prompt whose seed is -1.

    Raises:
        RequestFieldError: a value that only the model's data can refuse, such as an unknown sampler.
    """
    multipliers = [_multipliers(request, item) for item in request.prompts]
    base = {**base, "fidelity": request.fidelity or base.get("fidelity", "exact")}
    # As the trainer does it: one set of multipliers for all images is merged into the weights, several run beside them.
    mode = "merged" if base["fidelity"] == "fast" or len(set(multipliers)) == 1 else "live"
    recipes = []
    for index, item in enumerate(request.prompts):
        given = {
            "negative_prompt_2": item.neg_2,
            "guidance_scale": item.guidance_scale,
            "guidance_rescale": item.guidance_rescale,
            "steps": item.sample_steps,
            "sampler": item.sampler,
            "seed": draw_seed() if item.seed == -1 else item.seed,
        }
        fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if item.seed is None:
            fields["seed"] = get_family(request.model).default_seed + index
        try:
            recipe = Recipe(
                prompt=replace_trigger(
                    item.prompt, (item.trigger_word or request.trigger_word) or ""
                ),
                negative_prompt=item.neg or "",
                model=request.model,
                width=item.width or DEFAULT_SIZE,
                height=item.height or DEFAULT_SIZE,
                adapters=tuple(
                    AdapterRef(ref.sha256, multiplier, ref.name, ref.path, lora.alpha)
                    for ref, lora, multiplier in zip(
                        adapters, request.loras, multipliers[index], strict=True
                    )
                ),
                adapter_mode=mode,  # type: ignore[arg-type]
                **fields,
                **base,
            )
        except RecipeError as error:
            place = ("prompts", index, _FIELD_OF.get(error.field, error.field))
            raise RequestFieldError(str(error), place=place) from error
        recipes.append(recipe)
    return tuple(recipes)


def request_for(recipes: Sequence[Recipe], lora_path: str) -> dict[str, Any]:
    """The body of the request that makes these images, each with the same one adapter, which the server knows as `lora_path`.

    What the server decides (base model, precision, VAE) is not in it.

    Raises:
        RequestFieldError: a value that the API does not take, such as a guidance scale beyond 20.
    """
    same = {(adapter.sha256, adapter.alpha) for recipe in recipes for adapter in recipe.adapters}
    assert len(same) == 1, "one adapter, and the same in every recipe"
    ((sha256, alpha),) = same
    body = {
        "model": recipes[0].model,
        "fidelity": recipes[0].fidelity,
        "loras": [
            {"path": lora_path, "sha256": sha256} | ({} if alpha is None else {"alpha": alpha})
        ],
        "prompts": [
            {
                "prompt": recipe.prompt,
                "neg": recipe.negative_prompt,
                "width": recipe.width,
                "height": recipe.height,
                "guidance_scale": recipe.guidance_scale,
                "sample_steps": recipe.steps,
                "sampler": recipe.sampler,
                "seed": recipe.seed,
                "network_multiplier": recipe.adapters[0].multiplier,
            }
            | ({} if recipe.negative_prompt_2 is None else {"neg_2": recipe.negative_prompt_2})
            | (
                {}
                if recipe.guidance_rescale == 0
                else {"guidance_rescale": recipe.guidance_rescale}
            )
            for recipe in recipes
        ],
    }
    try:
        InferenceRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RequestFieldError(
            f"The HTTP API does not take {place} {first['input']!r}: {first['msg']}.",
            place=first["loc"],
        ) from None
    return body


def _multipliers(request: InferenceRequest, item: PromptItem) -> tuple[float, ...]:
    """For each LoRA: the prompt's own multiplier, else the LoRA's, else 1."""
    own = item.network_multiplier
    if isinstance(own, list):
        return tuple(own)
    return tuple(
        own
        if own is not None
        else lora.network_multiplier
        if lora.network_multiplier is not None
        else 1.0
        for lora in request.loras
    )


def _unusable_fields(request: InferenceRequest) -> Iterator[tuple[str, str]]:
    """Where in the request, and which field: unknown ones, and those of other models."""
    yield from (("", name) for name in request.model_extra or {})
    for index, lora in enumerate(request.loras):
        yield from ((f"loras[{index}].", name) for name in lora.model_extra or {})
    for index, item in enumerate(request.prompts):
        place = f"prompts[{index}]."
        yield from ((place, name) for name in item.model_extra or {})
        yield from ((place, name) for name in _OF_OTHER_MODELS if getattr(item, name) is not None)
        if item.num_frames not in (None, 1):
            yield place, "num_frames"
