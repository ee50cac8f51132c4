"""The results of the *Make* tab: progress, gallery, and snippets of the selected image."""

from __future__ import annotations

from typing import Any

import gradio as gr

from fidelora.server.page.html import notice

SNIPPETS = ("recipe", "request", "command", "python")
"""Names of the snippet components, in the order of their tabs."""


class MakeResults:
    """Components of the results; created inside a `gr.Blocks`.

    Attributes:
        snippets: the code boxes of `SNIPPETS`, by name.
        job: id of the job that the page follows; empty if there is none.
        shown: `ImageId`s of the images in the gallery.
        selected: index of the selected image in `shown`.
        remembered: entries stored in the browser: `(job id, -1)` for the followed job, then the
            entries of `shown`.
    """

    def __init__(self) -> None:
        self.progress = gr.Markdown(
            notice("Choose a LoRA, enter a prompt and click Generate."),
            latex_delimiters=[],
            elem_id="progress",
        )
        self.gallery = gr.Gallery(
            label="Images",
            columns=2,
            fit_columns=False,
            object_fit="contain",
            height="auto",
            interactive=False,
            elem_id="gallery",
            buttons=["download", "fullscreen"],
        )
        self.use = gr.Button("Use this image's settings", visible=False, elem_id="use", size="sm")
        self.snippets: dict[str, Any] = {}
        self.details = gr.Accordion("Recipe of the image", open=True, visible=False)
        with self.details, gr.Tabs():
            for name, title, label, language in (
                ("recipe", "Recipe", "Recipe", "json"),
                ("request", "Request", "POST /v1/inference", "json"),
                ("command", "CLI", "Command line", "shell"),
                ("python", "Python", "Python", "python"),
            ):
                with gr.Tab(title):
                    self.snippets[name] = gr.Code(
                        language=language,
                        label=label,
                        elem_id=name,
                        max_lines=20,
                        wrap_lines=name == "command",
                    )
        self.job = gr.State("")
        self.shown = gr.State([])
        self.selected = gr.State(0)
        self.remembered = gr.BrowserState([], storage_key="fidelora-images", secret="images")
