"""The form of the *Make* tab: its inputs, and the conversion between their values and a `Form`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import gradio as gr

from fidelora.api import ImageFormat
from fidelora.errors import WrongUseError
from fidelora.families import all_families, get_family
from fidelora.recipe import MAX_MULTIPLIER, Fidelity
from fidelora.server.page.events import IMMEDIATE
from fidelora.server.page.form import (
    LABELS,
    MAX_LORAS,
    Form,
    api_range,
    family_defaults,
    read_seed,
)
from fidelora.server.page.lora_list import LoraList

MAX_IMAGES = 16
"""Largest number of images per click; the HTTP API allows more."""

Handled = tuple[str, list[str]]
"""Model and LoRA paths for which the dependent inputs were last updated.

Drop-down lists emit input events even if they merely gain or lose focus, so the handlers compare
the choice with these values.
"""


class MakeForm:
    """Inputs of the form; created inside a `gr.Blocks` and connected by `listen`.

    Attributes:
        fields: the input of each request field, by the keys of `LABELS`.
    """

    def __init__(self, lora_list: LoraList, default_fidelity: str) -> None:
        self._lora_list = lora_list
        self._model = next(iter(all_families()))
        self.fields: dict[str, Any] = {}
        self.loras = gr.Dropdown(
            [],
            multiselect=True,
            max_choices=MAX_LORAS,
            filterable=True,
            label="LoRAs",
            elem_id="loras",
            info="Type to search by name, trigger word, rank or step. "
            "LoRAs are applied in the order shown.",
        )
        self.multipliers = [
            gr.Slider(
                -MAX_MULTIPLIER,
                MAX_MULTIPLIER,
                1,
                step=0.05,
                visible=False,
                label=f"Multiplier {index + 1}",
                elem_id=f"multiplier-{index}",
            )
            for index in range(MAX_LORAS)
        ]
        self._build_prompts()
        with gr.Accordion("Settings", open=True):
            self._build_settings(default_fidelity)
        self.image = gr.File(
            label="Drop an image to load its recipe",
            file_types=[".png", ".jpg", ".jpeg", ".webp"],
            height=150,
            elem_id="recipe-image",
        )
        self.loaded = gr.Markdown(latex_delimiters=[], elem_id="loaded")
        self.handled = gr.State((self._model, []))

    def _build_prompts(self) -> None:
        self.fields["prompt"] = gr.Textbox(
            label=LABELS["prompt"],
            lines=3,
            max_lines=10,
            elem_id="prompt",
            placeholder="a photo of [trigger]",
            info="[trigger] is replaced by the trigger word.",
        )
        with gr.Row():
            self.fields["trigger_word"] = gr.Textbox(
                label=LABELS["trigger_word"], elem_id="trigger", min_width=140, scale=1
            )
            self.fields["neg"] = gr.Textbox(
                label=LABELS["neg"], elem_id="negative", min_width=140, scale=2
            )
        with gr.Row():
            self.generate = gr.Button(
                "Generate", variant="primary", elem_id="generate", scale=3, min_width=140
            )
            self.cancel = gr.Button(
                "Cancel",
                variant="stop",
                interactive=False,
                elem_id="cancel",
                scale=1,
                min_width=100,
            )

    def _build_settings(self, default_fidelity: str) -> None:
        spec, start = get_family(self._model), family_defaults(self._model)
        with gr.Row():
            self.fields["model"] = gr.Dropdown(
                [(family.title, family.id) for family in all_families().values()],
                value=spec.id,
                label=LABELS["model"],
                elem_id="model",
                min_width=140,
                scale=3,
            )
            self.fields["sampler"] = gr.Dropdown(
                list(spec.samplers),
                value=start["sampler"],
                label=LABELS["sampler"],
                elem_id="sampler",
                min_width=140,
                scale=2,
            )
        divisor = spec.resolution_divisor
        with gr.Row(elem_classes="four"):
            self._number("sample_steps", "steps", start, precision=0, limited=True)
            self._number("guidance_scale", "guidance", start, step=0.5, limited=True)
            self._number("width", "width", start, precision=0, step=divisor)
            self._number("height", "height", start, precision=0, step=divisor)
        with gr.Row(elem_classes="four"):
            self.seed = gr.Textbox(
                str(spec.default_seed),
                label="Seed",
                placeholder="random",
                elem_id="seed",
                min_width=60,
            )
            self.images = gr.Number(
                1,
                label="Images",
                precision=0,
                minimum=1,
                maximum=MAX_IMAGES,
                elem_id="number",
                min_width=60,
            )
            for field, choices, value in (
                ("fidelity", get_args(Fidelity), default_fidelity),
                ("output_format", get_args(ImageFormat), "png"),
            ):
                self.fields[field] = gr.Dropdown(
                    list(choices),
                    value=value,
                    label=LABELS[field],
                    elem_id=field.removeprefix("output_"),
                    min_width=60,
                )
        gr.Markdown(
            "Leave the seed empty for a random one. With several images, each seed is one higher "
            "than the one before. *exact* reproduces the trainer's sample bit for bit; *fast* is "
            "nearly identical.",
            elem_classes="help",
        )

    def _number(
        self,
        field: str,
        elem_id: str,
        start: dict[str, Any],
        *,
        limited: bool = False,
        **given: Any,
    ) -> None:
        if limited:
            given["minimum"], given["maximum"] = api_range(field)
        self.fields[field] = gr.Number(
            start[field], label=LABELS[field], elem_id=elem_id, min_width=60, **given
        )

    @property
    def inputs(self) -> list[Any]:
        """The components whose values `read` takes."""
        fields = [self.fields[name] for name in LABELS]
        return [self.loras, *self.multipliers, self.seed, self.images, *fields]

    @property
    def outputs(self) -> list[Any]:
        """The components that `message` and `show` update."""
        return [self.loaded, self.handled, *self.inputs]

    def listen(self) -> None:
        """Connect the inputs that depend on the LoRAs and on the model."""
        trigger = self.fields["trigger_word"]
        self.loras.input(
            self.update_loras,
            [self.handled, self.loras, trigger, *self.multipliers],
            [self.handled, *self.multipliers, trigger],
            **IMMEDIATE,
        )
        dependent = ("sampler", "sample_steps", "guidance_scale", "width", "height")
        self.fields["model"].input(
            self.update_model,
            [self.handled, self.fields["model"]],
            [self.handled, *(self.fields[name] for name in dependent)],
            **IMMEDIATE,
        )

    def read(self, values: Sequence[Any]) -> Form:
        """Convert the values of `inputs`.

        Raises:
            WrongUseError: the seed is not a number, or a number is missing.
        """
        loras, multipliers = values[0] or [], values[1 : 1 + MAX_LORAS]
        seed, images, *rest = values[1 + MAX_LORAS :]
        fields = dict(zip(LABELS, rest, strict=True))
        with_multipliers = tuple(zip(loras, multipliers, strict=False))
        numbers = {
            LABELS[name]: fields[name]
            for name in ("sample_steps", "guidance_scale", "width", "height")
        }
        numbers["Images"] = images
        numbers |= {f"Multiplier of {path}": number for path, number in with_multipliers}
        for label, value in numbers.items():
            if not isinstance(value, int | float):
                raise WrongUseError(f"{label} is empty; enter a number.")
        return Form(loras=with_multipliers, seed=read_seed(seed), images=images, fields=fields)

    def show(self, form: Form, message: str) -> list[Any]:
        """Return the updates of `outputs` that put a form's values into the inputs."""
        paths = [path for path, _ in form.loras]
        sliders = [
            gr.update(value=number, visible=True, label=f"Multiplier of {path}")
            for path, number in form.loras
        ]
        sliders += [gr.update(visible=False)] * (MAX_LORAS - len(sliders))
        samplers = list(get_family(form.fields["model"]).samplers)
        fields = dict(form.fields)
        fields["sampler"] = gr.update(choices=samplers, value=fields["sampler"])
        return [
            message,
            (form.fields["model"], paths),
            gr.update(choices=self._lora_list.choices(), value=paths),
            *sliders,
            str(form.seed),
            form.images,
            *(fields[name] for name in LABELS),
        ]

    def message(self, message: str) -> list[Any]:
        """Return the updates of `outputs` that show a message and leave the inputs as they are."""
        return [message, *[gr.skip()] * (1 + len(self.inputs))]

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
        sliders = [
            gr.update(value=kept.get(path, 1.0), visible=True, label=f"Multiplier of {path}")
            for path in paths
        ]
        sliders += [gr.update(value=1.0, visible=False)] * (MAX_LORAS - len(paths))
        if trigger in ("", self._lora_list.trigger(before)):
            trigger = self._lora_list.trigger(paths)
        return [(model, paths), *sliders, trigger]

    def update_model(self, handled: Handled, model: str) -> list[Any]:
        """Show the samplers and defaults of the chosen model family."""
        if model == handled[0]:
            return [gr.skip()] * 6
        spec, start = get_family(model), family_defaults(model)
        divisor = spec.resolution_divisor
        return [
            (model, handled[1]),
            gr.update(choices=list(spec.samplers), value=start["sampler"]),
            start["sample_steps"],
            start["guidance_scale"],
            gr.update(value=start["width"], step=divisor),
            gr.update(value=start["height"], step=divisor),
        ]
