"""Lumina-Image 2.0: one transformer on a flow, with Gemma 2 as the text encoder."""
