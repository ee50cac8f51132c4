"""The page: its tabs, its look, and the Gradio application that serves them. The only module to load when the page is wanted."""

from __future__ import annotations

import os
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI

from fidelora.server.context import ServerContext
from fidelora.server.page.pictures import PageFiles
from fidelora.server.page.verifications import Verifier

_CSS = """
.gradio-container { width: 100% !important; max-width: 90rem !important; margin: 0 auto !important; padding: .75rem !important; }
.four > .form { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); width: 100%; }
@media (max-width: 640px) { .four > .form { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
#gallery .grid-wrap { max-height: none; }
#said textarea { font-family: var(--font-mono); font-size: .8rem; white-space: pre; overflow-x: auto; }
#head { padding: 0 .25rem; } #head h1 { font-size: 1.15rem; margin: 0; } #head p { margin: 0; font-size: .85rem; }
#head .prose { display: flex; justify-content: space-between; align-items: baseline; }
.help, .help p { font-size: .85rem; opacity: .85; }
.said { display: flex; flex-wrap: wrap; gap: .3rem .8rem; align-items: center; overflow-wrap: anywhere; padding: .4rem 0; }
.said progress + span { width: 100%; }
.said progress { width: 100%; height: .5rem; appearance: none; border: 0; border-radius: 1rem; overflow: hidden;
  background: var(--border-color-primary); }
.said progress::-webkit-progress-bar { background: var(--border-color-primary); }
.said progress::-webkit-progress-value { background: var(--color-accent); }
.said progress::-moz-progress-bar { background: var(--color-accent); }
.said.error { border-left: .25rem solid #d33; padding-left: .75rem; }
.said.good { border-left: .25rem solid #2e9e5b; padding-left: .75rem; }
.said strong { text-transform: capitalize; font-size: 1.1rem; }
.said .rough { margin: 0; width: 16rem; max-width: 100%; image-rendering: pixelated; border-radius: .4rem; }
#gallery .caption-label { max-width: 100%; overflow: hidden; text-overflow: ellipsis; }
iframe.report { width: 100%; height: 75vh; border: 1px solid var(--border-color-primary); border-radius: .4rem; }
"""


def gradio_app(
    context: ServerContext, page_files: PageFiles, verifier: Verifier, root_path: str
) -> tuple[FastAPI, AbstractAsyncContextManager[Any]]:
    """The application that serves the page, and what has to be entered while it does.

    Gradio is loaded here and nowhere else; it is told first to send nothing anywhere, and where its files go.

    Args:
        root_path: the path of the public address, empty if it has none.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(page_files.files)
    import gradio as gr

    blocks = _blocks(context, page_files, verifier)
    shell = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    system = ["system-ui", "sans-serif"]
    gr.mount_gradio_app(
        shell,
        blocks,
        path="/",
        root_path=root_path or None,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=context.settings.job_max_mb * 2**20,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(font=system, font_mono=["ui-monospace", "monospace"]),
        css=_CSS,
    )
    return shell, shell.router.lifespan_context(shell)


def _blocks(context: ServerContext, page_files: PageFiles, verifier: Verifier) -> Any:
    import gradio as gr

    from fidelora.server.page.compare_tab import Compare
    from fidelora.server.page.lora_list import LoraList
    from fidelora.server.page.make_tab import Make
    from fidelora.server.page.match_tab import Match
    from fidelora.server.page.pictures import Pictures

    library = LoraList(context)
    with gr.Blocks(title="Fidelora", analytics_enabled=False, fill_width=True) as blocks:
        leave = '<p><a href="./logout">Leave</a></p>' if context.keys.names() else ""
        gr.Markdown(f"<h1>Fidelora</h1>{leave}", elem_id="head")
        with gr.Tab("Make") as tab_make:
            make = Make(context, Pictures(context, page_files, library), library)
        with gr.Tab("Match") as tab_match:
            match = Match(context, page_files, verifier)
        with gr.Tab("Compare") as tab_compare:
            compare = Compare(context, page_files, library, make)
        make.listen(blocks, tab_make)
        match.listen(tab_match)
        compare.listen(tab_compare)
    blocks.queue(api_open=False, max_size=200)
    return blocks
