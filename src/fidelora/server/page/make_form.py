"""The form of the *Make* tab: conversion between its values and a `Form`, and dependent inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from fidelora.errors import UsageError
from fidelora.families import get_family
from fidelora.server.page.events import IMMEDIATE
from fidelora.server.page.form import (
    LABELS,
    MAX_LORAS,
    Form,
    family_defaults,
    preset_choices,
    preset_of,
    read_seed,
    size_presets,
)
from fidelora.server.page.handlers import for_visitor
from fidelora.server.page.html import notice
from fidelora.server.page.lora_list import LoraList
from fidelora.server.page.make_prompts import PromptInputs
from fidelora.server.page.make_settings import SettingsInputs
from fidelora.server.page.stored_form import from_stored, to_stored

Handled = tuple[str, list[str]]
"""Model and LoRA paths for which the dependent inputs were last updated.

Drop-down lists emit input events even if they merely gain or lose focus, so the handlers compare
the choice with these values.
"""


class MakeForm:
    """Inputs of both parts of the form, connected by `listen`.

    Args:
        sides: width and height, in pixels, that the base model of each model family was trained
            at; the preselected family first.
    """

    def __init__(
        self,
        prompts: PromptInputs,
        settings: SettingsInputs,
        lora_list: LoraList,
        sides: Mapping[str, int],
    ) -> None:
        self._prompts = prompts
        self._settings = settings
        self._lora_list = lora_list
        self._sides = sides
        self.fields = prompts.fields | settings.fields
        self.handled = gr.State((next(iter(sides)), []))
        self.stored = gr.BrowserState(None, storage_key="fidelora-form", secret="form")

    @property
    def inputs(self) -> list[Any]:
        """The components whose values `read` takes."""
        fields = [self.fields[name] for name in LABELS]
        prompts, settings = self._prompts, self._settings
        return [prompts.loras, *prompts.multipliers, settings.seed, settings.images, *fields]

    @property
    def outputs(self) -> list[Any]:
        """The components that `message` and `show` update."""
        settings = self._settings
        return [self._prompts.loaded, self.handled, settings.preset, *self.inputs, settings.video]

    @property
    def lora_inputs(self) -> list[Any]:
        """The components whose values `update_loras` takes."""
        prompts = self._prompts
        return [self.handled, prompts.loras, self.fields["trigger_word"], *prompts.multipliers]

    @property
    def lora_outputs(self) -> list[Any]:
        """The components that `update_loras` updates."""
        return [self.handled, *self._prompts.multipliers, self.fields["trigger_word"]]

    def listen(self) -> None:
        """Connect the inputs that depend on each other."""
        fields, prompts, settings = self.fields, self._prompts, self._settings
        prompts.loras.input(
            for_visitor(self.update_loras), self.lora_inputs, self.lora_outputs, **IMMEDIATE
        )
        dependent = ("sampler", "sample_steps", "guidance_scale", "width", "height")
        fields["model"].input(
            self.update_model,
            [self.handled, fields["model"]],
            [
                self.handled,
                settings.preset,
                *(fields[name] for name in dependent),
                settings.video,
                fields["num_frames"],
                fields["fps"],
            ],
            **IMMEDIATE,
        )
        size = [fields["width"], fields["height"]]
        settings.preset.input(
            self._apply_preset, [fields["model"], settings.preset], size, **IMMEDIATE
        )
        gr.on(
            [one.input for one in size],
            self._preset_of,
            [fields["model"], *size],
            settings.preset,
            **IMMEDIATE,
        )
        settings.random_seed.click(lambda: "", None, settings.seed, **IMMEDIATE)
        fields["prompt"].blur(
            for_visitor(self._find_embedding),
            [fields["prompt"], prompts.loras],
            [prompts.named_embedding, prompts.embedding_text, prompts.embedding_path],
            **IMMEDIATE,
        )
        prompts.use_embedding.click(
            for_visitor(self._use_embedding),
            [prompts.embedding_path, *self.lora_inputs],
            [prompts.named_embedding, prompts.loras, *self.lora_outputs],
            **IMMEDIATE,
        )
        texts = (*(fields[name] for name in ("prompt", "trigger_word", "neg")), settings.seed)
        numbers = (
            fields[name]
            for name in ("sample_steps", "guidance_scale", "width", "height", "num_frames", "fps")
        )
        choices = (fields[name] for name in ("model", "sampler", "emphasis", "fidelity"))
        gr.on(
            [
                *(one.blur for one in texts),
                *(one.blur for one in numbers),
                *(one.input for one in choices),
                *(one.release for one in prompts.multipliers),
                prompts.loras.input,
                settings.preset.input,
            ],
            self._store,
            self.inputs,
            self.stored,
            **IMMEDIATE,
        )

    def read(self, values: Sequence[Any]) -> Form:
        """Convert the values of `inputs`.

        Raises:
            UsageError: the seed is not a number, or a number is missing.
        """
        loras, multipliers = values[0] or [], values[1 : 1 + MAX_LORAS]
        seed, images, *rest = values[1 + MAX_LORAS :]
        fields = dict(zip(LABELS, rest, strict=True))
        with_multipliers = tuple(zip(loras, multipliers, strict=False))
        numbers = {
            LABELS[name]: fields[name]
            for name in (
                "sample_steps",
                "guidance_scale",
                "width",
                "height",
                "num_frames",
                "fps",
            )
        }
        numbers["Images"] = images
        numbers |= {f"Multiplier of {path}": number for path, number in with_multipliers}
        for label, value in numbers.items():
            if not isinstance(value, int | float):
                raise UsageError(f"{label} is empty; enter a number.")
        return Form(loras=with_multipliers, seed=read_seed(seed), images=images, fields=fields)

    def show(self, form: Form, message: str) -> list[Any]:
        """Return the updates of `outputs` that put a form's values into the inputs."""
        paths = [path for path, _ in form.loras]
        fields = dict(form.fields)
        model, width, height = fields["model"], fields["width"], fields["height"]
        side, samplers = self._sides[model], list(get_family(model).samplers)
        fields["sampler"] = gr.update(choices=samplers, value=fields["sampler"])
        return [
            message,
            (model, paths),
            gr.update(choices=preset_choices(side), value=preset_of(side, width, height)),
            gr.update(choices=self._lora_list.choices(), value=paths),
            *self._prompts.sliders(form.loras),
            "" if form.seed is None else str(form.seed),
            form.images,
            *(fields[name] for name in LABELS),
            gr.update(visible=get_family(model).makes_videos),
        ]

    def restore(self, stored: object, models: Sequence[str]) -> list[Any]:
        """Return the updates of `outputs` that show the form from before a reload.

        Args:
            stored: value of the component `stored`.
            models: ids of the models of this server.
        """
        found = from_stored(stored, models, [path for _, path in self._lora_list.choices()])
        if found is None:
            return self.message("")
        form, missing = found
        gone = ", ".join(missing)
        return self.show(form, notice(f"No longer on this server: {gone}.") if gone else "")

    def _store(self, *values: Any) -> Any:
        try:
            return to_stored(self.read(values))
        except UsageError:  # the value is being edited
            return gr.skip()

    def message(self, message: str) -> list[Any]:
        """Return the updates of `outputs` that show a message and leave the inputs as they are."""
        return [message, *[gr.skip()] * (3 + len(self.inputs))]

    def update_loras(
        self, handled: Handled, paths: list[str], trigger: str, *multipliers: Any
    ) -> list[Any]:
        """Show one slider per LoRA, and the trigger word unless the user has edited it."""
        model, before = handled
        paths = paths or []
        if paths == before:
            return [gr.skip()] * (MAX_LORAS + 2)
        # A multiplier stays with its LoRA when the LoRA moves in the list.
        kept = dict(zip(before, multipliers, strict=False))
        sliders = self._prompts.sliders([(path, kept.get(path, 1.0)) for path in paths])
        if trigger in ("", self._lora_list.trigger(before)):
            trigger = self._lora_list.trigger(paths)
        return [(model, paths), *sliders, trigger]

    def add_loras(
        self, added: Sequence[str], handled: Handled, paths: list[str], *values: Any
    ) -> list[Any]:
        """Return the updates of the LoRA list and of `lora_outputs` that choose more LoRAs."""
        chosen = list(dict.fromkeys([*(paths or []), *added]))[:MAX_LORAS]
        choices = gr.update(choices=self._lora_list.choices(), value=chosen)
        return [choices, *self.update_loras(handled, chosen, *values)]

    def update_model(self, handled: Handled, model: str) -> list[Any]:
        """Show the samplers and defaults of the chosen model family."""
        if model == handled[0]:
            return [gr.skip()] * 10
        spec, side = get_family(model), self._sides[model]
        start, divisor = family_defaults(model, side), spec.resolution_divisor
        return [
            (model, handled[1]),
            gr.update(
                choices=preset_choices(side),
                value=preset_of(side, start["width"], start["height"]),
            ),
            gr.update(choices=list(spec.samplers), value=start["sampler"]),
            start["sample_steps"],
            start["guidance_scale"],
            gr.update(value=start["width"], step=divisor),
            gr.update(value=start["height"], step=divisor),
            gr.update(visible=spec.makes_videos),
            start["num_frames"],
            start["fps"],
        ]

    def _preset_of(self, model: str, width: int | None, height: int | None) -> str:
        return preset_of(self._sides[model], width, height)

    def _apply_preset(self, model: str, preset: str | None) -> list[Any]:
        if preset is None:  # the list lost the focus
            return [gr.skip(), gr.skip()]
        return list(size_presets(self._sides[model]).get(preset, [gr.skip(), gr.skip()]))

    def _find_embedding(self, prompt: str, chosen: list[str]) -> list[Any]:
        """Offer an embedding whose word is in the prompt.

        Unless the embedding is chosen, the word is ordinary text.
        """
        found = self._lora_list.embedding_in(prompt, chosen or [])
        if found is None:
            return [gr.update(visible=False), "", ""]
        word, path = found
        return [
            gr.update(visible=True),
            notice(f"The prompt contains {word}, the word of the embedding {path}."),
            path,
        ]

    def _use_embedding(self, path: str, *values: Any) -> list[Any]:
        return [gr.update(visible=False), *self.add_loras([path], *values)]
