"""Adapters (LoRA, LoKr, LoHa): reading their files strictly, and putting them on a base model by either of two paths."""
