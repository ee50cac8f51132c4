"""The web page at `/`. The server runs without Gradio, because only `blocks` loads it."""
