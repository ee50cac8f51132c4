"""Adapters (LoRA, DoRA, LoKr, LoHa): strict reading of their files, and their merged and live path."""
