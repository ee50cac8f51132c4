"""Wan 2.1 and 2.2: transformers on a flow of videos, with UMT5 as the text encoder."""
