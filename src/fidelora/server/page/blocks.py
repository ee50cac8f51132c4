"""The Gradio application of the page: tabs, CSS and mounting. Imported only if the page is on."""

from __future__ import annotations

import os
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI

from fidelora.server.context import ServerContext
from fidelora.server.page.pictures import PageFiles
from fidelora.server.page.verifications import Verifier

_CSS = """
.gradio-container {
  width: 100% !important; max-width: 90rem !important; margin: 0 auto !important;
  padding: .75rem !important;
}
.four > .form { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); width: 100%; }
@media (max-width: 640px) {
  .four > .form { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
#gallery .grid-wrap { max-height: none; }
#verify-output textarea {
  font-family: var(--font-mono); font-size: .8rem; white-space: pre; overflow-x: auto;
}
#head { padding: 0 .25rem; }
#head h1 { font-size: 1.15rem; margin: 0; }
#head p { margin: 0; font-size: .85rem; }
#head .prose { display: flex; justify-content: space-between; align-items: baseline; }
.help, .help p { font-size: .85rem; opacity: .85; }
.message {
  display: flex; flex-wrap: wrap; gap: .3rem .8rem; align-items: center;
  overflow-wrap: anywhere; padding: .4rem 0;
}
.message progress + span { width: 100%; }
.message progress {
  width: 100%; height: .5rem; appearance: none; border: 0; border-radius: 1rem; overflow: hidden;
  background: var(--border-color-primary);
}
.message progress::-webkit-progress-bar { background: var(--border-color-primary); }
.message progress::-webkit-progress-value { background: var(--color-accent); }
.message progress::-moz-progress-bar { background: var(--color-accent); }
.message.error { border-left: .25rem solid #d33; padding-left: .75rem; }
.message.good { border-left: .25rem solid #2e9e5b; padding-left: .75rem; }
.message strong { text-transform: capitalize; font-size: 1.1rem; }
.message .preview {
  margin: 0; width: 16rem; max-width: 100%; image-rendering: pixelated; border-radius: .4rem;
}
#gallery .caption-label { max-width: 100%; overflow: hidden; text-overflow: ellipsis; }
iframe.report {
  width: 100%; height: 75vh; border: 1px solid var(--border-color-primary); border-radius: .4rem;
}
"""


def gradio_app(
    context: ServerContext, page_files: PageFiles, verifier: Verifier, root_path: str
) -> tuple[FastAPI, AbstractAsyncContextManager[Any]]:
    """Return the application that serves the page, and its lifespan context.

    Gradio must not be imported before this call: only at its import does it read the environment
    variables that disable its telemetry and set its folder.

    Args:
        root_path: path of the server's public URL, or an empty string.
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

    from fidelora.server.page.base_banner import BaseBanner
    from fidelora.server.page.compare_tab import CompareTab
    from fidelora.server.page.lora_list import LoraList
    from fidelora.server.page.make_tab import MakeTab
    from fidelora.server.page.match_tab import MatchTab
    from fidelora.server.page.pictures import Pictures

    lora_list = LoraList(context)
    with gr.Blocks(title="Fidelora", analytics_enabled=False, fill_width=True) as blocks:
        log_out = '<p><a href="./logout">Log out</a></p>' if context.keys.names() else ""
        gr.Markdown(f"<h1>Fidelora</h1>{log_out}", elem_id="head")
        banner = BaseBanner(context)
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
