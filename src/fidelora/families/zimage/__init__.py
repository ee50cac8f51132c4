"""Z-Image: one transformer on a flow, with Qwen3 as the text encoder."""
