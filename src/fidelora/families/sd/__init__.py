"""Stable Diffusion 1.5 and SDXL: a UNet on a noise schedule, with CLIP text encoders."""
