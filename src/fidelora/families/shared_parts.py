"""Parts of base models that several families share. Does not import torch."""

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType

from fidelora.families.spec import Part, Tokenizer

T5_ENCODER = Part(
    name="text_encoder_2",
    role="text_encoder",
    library="transformers",
    class_name="T5EncoderModel",
    weights="model",
    precision="text_encoder_dtype",
    tokenizer=Tokenizer("tokenizer_2"),
    # The trainer's version of the library transformers computes T5's attention with matrix products
    # only. Scaled dot product attention, the default of newer releases, changes 0.03 % of the
    # pixels.
    config=MappingProxyType({"attn_implementation": "eager"}),
    quantization="text_encoder_quantization",
)
"""T5, the second text encoder of FLUX.1, and the only one of Chroma."""

FLUX_VAE = Part(
    name="vae",
    role="decoder",
    library="diffusers",
    class_name="AutoencoderKL",
    weights="diffusion_pytorch_model",
    precision="vae_dtype",
)
"""FLUX.1's VAE with 16 channels."""


def with_companion(parts: Sequence[Part], companion: str) -> tuple[Part, ...]:
    """Return copies of the parts, in which all except the denoiser have this `Part.companion`."""
    return tuple(
        part if part.role == "denoiser" else replace(part, companion=companion) for part in parts
    )
