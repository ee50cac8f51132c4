"""LoRA files on disk: LoRA folder, downloads, and cache by sha256. Does not import torch."""
