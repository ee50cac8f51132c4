"""Adapters (LoRA, DoRA, LoKr, LoHa): strict file reading, and the merged and the live path."""
