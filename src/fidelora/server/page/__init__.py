"""The web page at `/`. Only `blocks` and the modules that it imports need Gradio."""
