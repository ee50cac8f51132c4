"""Rules by which the timesteps of a noise schedule are chosen. Does not import torch."""

from __future__ import annotations

from typing import Literal

TimestepSpacing = Literal["default", "trailing", "sgm_uniform"]
"""`default` is the sampler's own rule; for the trainer's samplers, this is the trainer's rule.
`trailing` is that of diffusers: evenly spaced, beginning with the last training timestep.
`sgm_uniform` is the scheduler of that name in ComfyUI; AUTOMATIC1111 and Forge call it SGM Uniform.
"""
