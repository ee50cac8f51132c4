"""Chroma: a transformer derived from FLUX.1, with T5 as the only text encoder."""
