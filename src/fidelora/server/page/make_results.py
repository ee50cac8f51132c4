"""The results of the *Make* tab: gallery, downloads, and snippets of the selected image."""

from __future__ import annotations

from typing import Any

import gradio as gr

from fidelora.server.page.request_queue import Session

SNIPPETS = ("recipe", "request", "command", "python")
"""Names of the snippet components, in the order of their tabs."""


class MakeResults:
    """Components of the results; created inside a `gr.Blocks`.

    Attributes:
        snippets: the code boxes of `SNIPPETS`, by name.
        session: the visitor's `Session`.
        remembered: entries stored in the browser (`Session.remembered`).
    """

    def __init__(self) -> None:
        # Not gr.HTML, whose templates need scripts that the security policy forbids.
        self.preview = gr.Markdown(visible=False, latex_delimiters=[], elem_id="preview")
        self.empty = gr.Markdown("Images appear here.", elem_id="empty", elem_classes="help")
        self.gallery = gr.Gallery(
            label="Images",
            columns=2,
            fit_columns=False,
            object_fit="contain",
            height="auto",
            interactive=False,
            visible=False,
            elem_id="gallery",
            buttons=["download", "fullscreen"],
        )
        with gr.Row(visible=False, elem_id="image-actions") as self.actions:
            self.use = gr.Button("Use this image's settings", elem_id="use", size="sm")
            self.download = gr.Markdown(latex_delimiters=[], elem_id="download-all")
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
        self.session = gr.State(Session())
        self.remembered = gr.BrowserState([], storage_key="fidelora-images", secret="images")
