"""The second part of the *Make* form: model, sampler, size, seed and format, and dropped files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import gradio as gr

from fidelora.api import OutputFormat
from fidelora.families import Family
from fidelora.recipe import Fidelity
from fidelora.server.page.form import (
    LABELS,
    api_range,
    family_defaults,
    preset_choices,
    preset_of,
)

MAX_IMAGES = 16
"""Largest number of images per click; the HTTP API allows more."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".mp4")


class SettingsInputs:
    """Components of the part; created inside a `gr.Blocks`.

    Args:
        families: the families to offer, the preselected one first.
        side: width and height, in pixels, that the preselected family's base model was trained at.

    Attributes:
        fields: the input of each request field, by the keys of `LABELS`.
    """

    def __init__(self, families: Sequence[Family], side: int, default_fidelity: str) -> None:
        self._families = families
        self._side = side
        self.fields: dict[str, Any] = {}
        with gr.Accordion("Settings", open=True):
            self._build_model()
            self._build_size()
            self._build_seed(default_fidelity)
        self.drop = gr.File(
            label="Drop LoRAs, or an image for its recipe",
            file_count="multiple",
            height=150,
            elem_id="drop",
        )

    def _build_model(self) -> None:
        spec = self._families[0]
        with gr.Row():
            self.fields["model"] = gr.Dropdown(
                [(family.title, family.id) for family in self._families],
                value=spec.id,
                label=LABELS["model"],
                elem_id="model",
                min_width=140,
                scale=3,
            )
            self.fields["sampler"] = gr.Dropdown(
                list(spec.samplers),
                value=spec.default_sampler,
                label=LABELS["sampler"],
                elem_id="sampler",
                min_width=140,
                scale=2,
            )

    def _build_size(self) -> None:
        spec = self._families[0]
        start = family_defaults(spec.id, self._side)
        divisor = spec.resolution_divisor
        with gr.Row(elem_classes="four"):
            self._number("sample_steps", "steps", start, precision=0, limited=True)
            self._number("guidance_scale", "guidance", start, step=0.5, limited=True)
            self._number("width", "width", start, precision=0, step=divisor)
            self._number("height", "height", start, precision=0, step=divisor)

        with gr.Row(visible=spec.makes_videos) as self.video:
            self._number("num_frames", "frames", start, precision=0, limited=True)
            self._number("fps", "fps", start, precision=0, limited=True)
        self.preset = gr.Dropdown(
            preset_choices(self._side),
            value=preset_of(self._side, start["width"], start["height"]),
            label="Size preset",
            elem_id="preset",
        )

    def _build_seed(self, default_fidelity: str) -> None:
        with gr.Row(elem_classes="four"):
            self.seed = gr.Textbox(
                str(self._families[0].default_seed),
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
                ("output_format", get_args(OutputFormat), "png"),
            ):
                self.fields[field] = gr.Dropdown(
                    list(choices),
                    value=value,
                    label=LABELS[field],
                    elem_id=field.removeprefix("output_"),
                    min_width=60,
                )
        with gr.Row():
            self.random_seed = gr.Button(
                "Random seed", size="sm", min_width=100, elem_id="random-seed"
            )
            self.reuse_seed = gr.Button(
                "Seed of the image",
                size="sm",
                min_width=100,
                interactive=False,
                elem_id="reuse-seed",
            )
        makes_videos = any(family.makes_videos for family in self._families)
        about_videos = " Videos are MP4 or WebP files." if makes_videos else ""
        gr.Markdown(
            "An empty seed is random. *Seed of the image* copies that of the selected image. With "
            "several images, each seed is one higher than the one before. *exact* reproduces the "
            "trainer's sample bit for bit; *fast* is nearly identical." + about_videos,
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
