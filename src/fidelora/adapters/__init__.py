"""Adapters (LoRA, DoRA, LoKr, LoHa): strict reading of files, merged path and live path."""
