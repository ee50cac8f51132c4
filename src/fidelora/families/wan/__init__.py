"""Wan 2.1: one transformer on a flow of videos, with UMT5 as the text encoder."""
