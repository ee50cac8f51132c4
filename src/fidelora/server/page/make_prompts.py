"""The first part of the *Make* form: LoRAs, prompts, the buttons, and messages beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from fidelora.recipe import MAX_MULTIPLIER
from fidelora.server.page.form import LABELS, MAX_LORAS
from fidelora.server.page.html import notice
from fidelora.server.page.lora_list import LoraList
from fidelora.server.page.uploads import LORA_SUFFIX


class PromptInputs:
    """Components of the part; created inside a `gr.Blocks`.

    Attributes:
        fields: the input of each request field, by the keys of `LABELS`.
        loaded: result of the last upload, or of loading a recipe.
        error: reason why the form was not sent.
        progress: the running requests, and those that have ended since the queue was empty.
        waiting: the requests that wait, with buttons to cancel them.
    """

    def __init__(self, lora_list: LoraList) -> None:
        self._lora_list = lora_list
        self.fields: dict[str, Any] = {}
        self.loaded = gr.Markdown(latex_delimiters=[], elem_id="loaded")
        self.loras = gr.Dropdown(
            [],
            multiselect=True,
            max_choices=MAX_LORAS,
            filterable=True,
            label="LoRAs and embeddings",
            elem_id="loras",
            info="Optional. Type to search by name, trigger word, rank or step. "
            "LoRAs are applied in the order shown.",
        )
        self.upload = gr.UploadButton(
            "Upload a LoRA or an embedding",
            file_types=[LORA_SUFFIX],
            file_count="multiple",
            size="sm",
            elem_id="upload",
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
        self._build_buttons()

    def _build_prompts(self) -> None:
        self.fields["prompt"] = gr.Textbox(
            label=LABELS["prompt"],
            lines=3,
            max_lines=10,
            elem_id="prompt",
            placeholder="a photo of [trigger]",
            info="[trigger] is replaced by the trigger word. Ctrl+Enter generates.",
        )
        with gr.Row(visible=False, elem_id="named-embedding") as self.named_embedding:
            self.embedding_text = gr.Markdown(latex_delimiters=[], elem_classes="help")
            self.use_embedding = gr.Button(
                "Use it", size="sm", scale=0, min_width=100, elem_id="use-embedding"
            )
        self.embedding_path = gr.State("")
        self.history = gr.Dropdown(
            [], label="Recent prompts", visible=False, filterable=True, elem_id="history"
        )
        self.stored_history = gr.BrowserState([], storage_key="fidelora-prompts", secret="prompts")
        with gr.Row():
            self.fields["trigger_word"] = gr.Textbox(
                label=LABELS["trigger_word"], elem_id="trigger", min_width=140, scale=1
            )
            self.fields["neg"] = gr.Textbox(
                label=LABELS["neg"], elem_id="negative", min_width=140, scale=2
            )

    def _build_buttons(self) -> None:
        with gr.Row():
            self.generate = gr.Button(
                "Generate", variant="primary", elem_id="generate", scale=3, min_width=140
            )
            self.cancel = gr.Button(
                "Cancel", interactive=False, elem_id="cancel", scale=1, min_width=100
            )
            self.cancel_all = gr.Button(
                "Cancel all", visible=False, elem_id="cancel-all", scale=1, min_width=100
            )
        # The buttons in the list of requests put their `button_number` here (script.js).
        self.cancel_one = gr.Number(elem_id="cancel-one", precision=0, show_label=False)
        self.error = gr.Markdown(latex_delimiters=[], elem_id="error")
        self.progress = gr.Markdown(
            notice("Enter a prompt, choose LoRAs if you like, and click Generate."),
            latex_delimiters=[],
            elem_id="progress",
        )
        # A component of its own: an update of the progress would replace a button under the mouse.
        self.waiting = gr.Markdown(latex_delimiters=[], elem_id="waiting")

    def sliders(self, loras: Sequence[tuple[str, float]]) -> list[Any]:
        """Return the updates of the sliders that show these multipliers.

        An embedding has no multiplier, so its slider is hidden and stays at 1.
        """
        updates = []
        for path, multiplier in loras:
            embedding = self._lora_list.is_embedding(path)
            updates.append(
                gr.update(
                    value=1.0 if embedding else multiplier,
                    visible=not embedding,
                    label=f"Multiplier of {path}",
                )
            )
        hidden = [gr.update(value=1.0, visible=False)] * (MAX_LORAS - len(updates))
        return updates + hidden
