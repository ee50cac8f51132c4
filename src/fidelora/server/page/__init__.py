"""The web page at `/`. Only what `page.py` loads knows Gradio; the rest of the server works without it."""
