"""LoRA files on disk: the folder that requests name them from, downloads, and the cache by content. Needs no torch."""
