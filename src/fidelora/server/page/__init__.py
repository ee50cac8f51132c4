"""The web page at `/`. Only `blocks` and the tabs import Gradio; the server runs without it."""
