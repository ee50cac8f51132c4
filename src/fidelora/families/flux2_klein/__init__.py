"""FLUX.2-klein: one transformer on a flow, with Qwen3 as the text encoder."""
