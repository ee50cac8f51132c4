"""LoRA files on disk: the folder of LoRAs, downloads, and the cache by sha256. Needs no torch."""
