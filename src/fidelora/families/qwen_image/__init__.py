"""Qwen-Image: one transformer on a flow, with Qwen2.5-VL as the text encoder."""
