"""The decoder of FLUX.2's VAE, computed in the order of operations of its original code.

diffusers' `AutoencoderKLFlux2` computes the same function with other kernels: its attention
projects with matrices, the original code with 1x1 convolutions.
Source: https://github.com/black-forest-labs/flux2, `src/flux2/autoencoder.py`, `AutoEncoder`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

_GROUPS = 32  # number of groups in each group norm
_GROUP_EPS = 1e-6
_BATCH_EPS = 1e-4
_PATCH = 2  # each latent pixel has the channels of 2x2 pixels of the decoder's input


@dataclass(frozen=True)
class Config:
    """Sizes of the decoder.

    Attributes:
        latent_channels: channels of the decoder's input; latents have four times as many.
        channels: channels of each level, from the image to the latents.
        layers: number of residual blocks in each level.
    """

    latent_channels: int
    channels: tuple[int, ...]
    layers: int

    @classmethod
    def of_diffusers(cls, config: Mapping[str, Any]) -> Self:
        """Return the sizes in a configuration of diffusers' `AutoencoderKLFlux2`.

        Raises:
            ValueError: it describes a variant that this module does not implement.
        """
        fixed = {
            "out_channels": 3, "act_fn": "silu", "norm_num_groups": _GROUPS,
            "use_post_quant_conv": True, "mid_block_add_attention": True,
            "batch_norm_eps": _BATCH_EPS,
        }  # fmt: skip
        for key, value in fixed.items():
            if config.get(key, value) != value:
                raise ValueError(f"{key} must be {value}, not {config[key]}")
        if tuple(config.get("patch_size", (_PATCH, _PATCH))) != (_PATCH, _PATCH):
            raise ValueError("patch_size must be 2x2")
        channels = config.get("decoder_block_out_channels") or config["block_out_channels"]
        return cls(config["latent_channels"], tuple(channels), config["layers_per_block"] + 1)


class Flux2Decoder(nn.Module):
    """The decoding half of the VAE, with the statistics that normalise latents."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.bn = _Statistics(config.latent_channels * _PATCH**2)
        self.decoder = _Decoder(config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Return a decoder for a configuration of diffusers' `AutoencoderKLFlux2`.

        Raises:
            ValueError: it describes a variant that this module does not implement.
        """
        return cls(Config.of_diffusers(config))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.decoder.conv_in.weight.dtype

    def forward(self, latents: Tensor) -> Tensor:
        """Return pixels [batch, 3, 16h, 16w], -1..1, of latents [batch, channels, h, w]."""
        result: Tensor = self.decoder(unpacked(self.bn(latents)))
        return result


def unpacked(latents: Tensor) -> Tensor:
    """Return latents [..., 4 * channels, h, w] as [..., channels, 2h, 2w]."""
    return functional.pixel_shuffle(latents, _PATCH)


class _Statistics(nn.Module):
    """Mean and variance of each latent channel, as a batch norm stores them."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, latents: Tensor) -> Tensor:
        """Undo the normalisation of latents [batch, channels, h, w]."""
        deviation = torch.sqrt(self.running_var.view(1, -1, 1, 1) + _BATCH_EPS)
        return latents * deviation + self.running_mean.view(1, -1, 1, 1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, channels, eps=_GROUP_EPS)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)


def _swish(values: Tensor) -> Tensor:
    return values * torch.sigmoid(values)


class _Resnet(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), _conv(inputs, outputs)
        self.norm2, self.conv2 = _norm(outputs), _conv(outputs, outputs)
        self.nin_shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, states: Tensor) -> Tensor:
        hidden = self.conv1(_swish(self.norm1(states)))
        hidden = self.conv2(_swish(self.norm2(hidden)))
        shortcut = states if self.nin_shortcut is None else self.nin_shortcut(states)
        result: Tensor = shortcut + hidden
        return result


class _Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, states: Tensor) -> Tensor:
        """Add the attention between all pixels to states [batch, channels, h, w]."""
        normed = self.norm(states)
        query, key, value = (
            one(normed).flatten(2).transpose(1, 2).unsqueeze(1).contiguous()
            for one in (self.q, self.k, self.v)
        )
        attended = functional.scaled_dot_product_attention(query, key, value)
        image = attended.squeeze(1).transpose(1, 2).reshape(states.shape)
        result: Tensor = states + self.proj_out(image)
        return result


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, states: Tensor) -> Tensor:
        larger = functional.interpolate(states, scale_factor=2.0, mode="nearest")
        result: Tensor = self.conv(larger)
        return result


class _Level(nn.Module):
    """Residual blocks of one size, and the upsampling to the next size."""

    def __init__(self, inputs: int, outputs: int, layers: int, *, upsamples: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            _Resnet(inputs if layer == 0 else outputs, outputs) for layer in range(layers)
        )
        self.upsample = _Upsample(outputs) if upsamples else None

    def forward(self, states: Tensor) -> Tensor:
        for block in self.block:
            states = block(states)
        return states if self.upsample is None else self.upsample(states)


class _Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = _Resnet(channels, channels)
        self.attn_1 = _Attention(channels)
        self.block_2 = _Resnet(channels, channels)

    def forward(self, states: Tensor) -> Tensor:
        result: Tensor = self.block_2(self.attn_1(self.block_1(states)))
        return result


class _Decoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        channels = config.channels
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.conv_in = _conv(config.latent_channels, channels[-1])
        self.mid = _Middle(channels[-1])
        # Level 0 has the size of the image and runs last.
        self.up = nn.ModuleList(
            _Level(inputs, outputs, config.layers, upsamples=level > 0)
            for level, (inputs, outputs) in enumerate(
                zip((*channels[1:], channels[-1]), channels, strict=True)
            )
        )
        self.norm_out = _norm(channels[0])
        self.conv_out = _conv(channels[0], 3)

    def forward(self, states: Tensor) -> Tensor:
        states = self.mid(self.conv_in(self.post_quant_conv(states)))
        for level in reversed(self.up):
            states = level(states)
        result: Tensor = self.conv_out(_swish(self.norm_out(states)))
        return result
