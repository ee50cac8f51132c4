"""The Gradio application of the page: tabs, theme and mounting. Imported only if the page is on."""

from __future__ import annotations

import logging
import os
import traceback
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

from fastapi import FastAPI

from fidelora.server.context import ServerContext
from fidelora.server.page.bases import bases_line
from fidelora.server.page.pictures import PageFiles
from fidelora.server.page.uploads import max_upload_bytes
from fidelora.server.verifier import Verifier

_CSS = Path(__file__).with_name("style.css")

log = logging.getLogger("gradio")


class LoggedTracebacks(ModuleType):
    """The module `traceback` for Gradio, whose `print_exc` logs the error instead.

    Gradio would print errors as they are, so a caller could fill the disk with events of a megabyte
    that fail. The log shortens texts, and drops an error that repeats.
    """

    def print_exc(self) -> None:
        """Log the exception that is being handled."""
        log.warning("an event of the page failed", exc_info=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(traceback, name)


def gradio_app(
    context: ServerContext, page_files: PageFiles, verifier: Verifier, root_path: str
) -> tuple[FastAPI, AbstractAsyncContextManager[Any], frozenset[int]]:
    """Return the application that serves the page, its lifespan context, and event numbers.

    Gradio must not be imported before this call, because it reads the environment variables for
    its telemetry and its folder when it is imported, and not again.

    Args:
        root_path: path of the server's public URL, or an empty string.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(page_files.files)
    import gradio as gr
    from gradio import queueing, route_utils, routes, utils

    for module in (queueing, route_utils, routes, utils):
        module.traceback = LoggedTracebacks("traceback")
    blocks = _blocks(context, page_files, verifier)
    shell = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    gr.mount_gradio_app(
        shell,
        blocks,
        path="/",
        root_path=root_path or None,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=max_upload_bytes(context.settings),
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=_theme(),
        css=_CSS.read_text(encoding="utf-8"),
    )
    return shell, shell.router.lifespan_context(shell), frozenset(blocks.fns)


def _theme() -> Any:
    """Return Gradio's default theme with system fonts and a contrast of at least 4.5 : 1 (WCAG)."""
    import gradio as gr

    system = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=system, font_mono=["ui-monospace", "monospace"])
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        color_accent="*primary_700",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
    )


def _blocks(context: ServerContext, page_files: PageFiles, verifier: Verifier) -> Any:
    import gradio as gr

    from fidelora.server.page.compare_tab import CompareTab
    from fidelora.server.page.lora_list import LoraList
    from fidelora.server.page.make_tab import MakeTab
    from fidelora.server.page.match_tab import MatchTab
    from fidelora.server.page.not_ready_banner import NotReadyBanner
    from fidelora.server.page.pictures import Pictures

    lora_list = LoraList(context)
    with gr.Blocks(title="Fidelora", analytics_enabled=False, fill_width=True) as blocks:
        log_out = '<p><a href="./logout">Log out</a></p>' if context.keys.names() else ""
        gr.Markdown(f"<h1>Fidelora</h1>{bases_line(context)}{log_out}", elem_id="head")
        banner = NotReadyBanner(context)
        with gr.Tab("Make") as tab_make:
            make = MakeTab(context, Pictures(context, page_files, lora_list), lora_list)
        with gr.Tab("Match") as tab_match:
            match = MatchTab(context, page_files, verifier)
        with gr.Tab("Compare") as tab_compare:
            compare = CompareTab(context, page_files, lora_list, make.form)
        make.listen(blocks, tab_make)
        match.listen(tab_match)
        compare.listen(tab_compare)
        banner.listen(blocks)
    blocks.queue(api_open=False, max_size=200)
    return blocks
