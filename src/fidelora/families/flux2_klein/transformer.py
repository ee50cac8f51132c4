"""The transformer of FLUX.2, computed in the order of operations of its original code.

diffusers' `Flux2Transformer2DModel` computes the same function, but its projections are split and
its rotary tables are float64, so that the last bits differ. Modules have the names of the original
code, which are also those of adapter files.
Source: https://github.com/black-forest-labs/flux2, `src/flux2/model.py`, `Flux2`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

_EPS = 1e-6  # epsilon of all norms
_TIME_CHANNELS = 256  # width of the sinusoidal embedding of the timestep
_MAX_PERIOD = 10000  # longest period of this embedding


@dataclass(frozen=True)
class Config:
    """Sizes of the transformer.

    Attributes:
        in_channels: channels of a token, the same for input and output.
        text_width: width of the prompt embeddings.
        heads, head_width: attention heads, and the width of each.
        mlp_ratio: width of the feed-forward layers, as a multiple of `width`.
        double_blocks: number of blocks with separate weights for text and image.
        single_blocks: number of blocks that treat text and image alike.
        axes: width of the rotary embedding on each axis: time, row, column, text position.
        theta: base of the rotary frequencies.
    """

    in_channels: int
    text_width: int
    heads: int
    head_width: int
    mlp_ratio: float
    double_blocks: int
    single_blocks: int
    axes: tuple[int, ...]
    theta: float

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.heads * self.head_width

    @property
    def mlp_width(self) -> int:
        """Width of the feed-forward layers."""
        return int(self.width * self.mlp_ratio)

    @classmethod
    def of_diffusers(cls, config: Mapping[str, Any]) -> Self:
        """Return the sizes in a configuration of diffusers' `Flux2Transformer2DModel`.

        Raises:
            ValueError: it describes a variant that this module does not implement.
        """
        fixed = {
            "patch_size": 1, "eps": _EPS, "guidance_embeds": False,
            "timestep_guidance_channels": _TIME_CHANNELS,
        }  # fmt: skip
        for key, value in fixed.items():
            if config.get(key, value) != value:
                raise ValueError(f"{key} must be {value}, not {config[key]}")
        if config.get("out_channels") not in (None, config["in_channels"]):
            raise ValueError("out_channels must be equal to in_channels")
        axes = tuple(config["axes_dims_rope"])
        if sum(axes) != config["attention_head_dim"] or len(axes) != 4:
            raise ValueError("axes_dims_rope must be four numbers whose sum is attention_head_dim")
        return cls(
            in_channels=config["in_channels"],
            text_width=config["joint_attention_dim"],
            heads=config["num_attention_heads"],
            head_width=config["attention_head_dim"],
            mlp_ratio=config["mlp_ratio"],
            double_blocks=config["num_layers"],
            single_blocks=config["num_single_layers"],
            axes=axes,
            theta=config["rope_theta"],
        )


class Flux2Transformer(nn.Module):
    """The transformer without an embedding of the guidance scale, as in the klein models."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.img_in = _linear(config.in_channels, width)
        self.time_in = _TimeEmbedding(width)
        self.txt_in = _linear(config.text_width, width)
        self.double_stream_modulation_img = _Modulation(width, 6)
        self.double_stream_modulation_txt = _Modulation(width, 6)
        self.single_stream_modulation = _Modulation(width, 3)
        self.double_blocks = nn.ModuleList(
            _DoubleBlock(config) for _ in range(config.double_blocks)
        )
        self.single_blocks = nn.ModuleList(
            _SingleBlock(config) for _ in range(config.single_blocks)
        )
        self.final_layer = _FinalLayer(width, config.in_channels)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Return a transformer for a configuration of diffusers' `Flux2Transformer2DModel`.

        Raises:
            ValueError: it describes a variant that this module does not implement.
        """
        return cls(Config.of_diffusers(config))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.img_in.weight.dtype

    def forward(self, image: Tensor, text: Tensor, time: Tensor, rotary: Tensor) -> Tensor:
        """Return the predicted direction from data to noise, in the shape of `image`.

        Args:
            image: latents [batch, tokens, in_channels].
            text: prompt embeddings [batch, text tokens, text_width].
            time: timesteps [batch], 1 (noise) to 0 (data), in the dtype of the weights.
            rotary: result of `rotary_tables`, for the text tokens and then the image tokens.
        """
        condition = self.time_in(timestep_embedding(time))
        image_modulation = self.double_stream_modulation_img(condition)
        text_modulation = self.double_stream_modulation_txt(condition)
        modulation = self.single_stream_modulation(condition)

        image, text = self.img_in(image), self.txt_in(text)
        for block in self.double_blocks:
            image, text = block(image, text, image_modulation, text_modulation, rotary)
        states = torch.cat((text, image), dim=1)
        for block in self.single_blocks:
            states = block(states, modulation, rotary)
        result: Tensor = self.final_layer(states[:, text.shape[1] :], condition)
        return result


def rotary_tables(
    text_tokens: int, rows: int, columns: int, config: Config, device: torch.device
) -> Tensor:
    """Return the rotation of each pair of channels, float32 [tokens, head_width / 2, 2, 2].

    Text tokens come first; they differ only on the last axis. Image tokens follow row by row.
    """
    text = torch.zeros(text_tokens, 4, device=device)
    text[:, 3] = torch.arange(text_tokens, device=device)
    image = torch.zeros(rows, columns, 4, device=device)
    image[..., 1] = torch.arange(rows, device=device)[:, None]
    image[..., 2] = torch.arange(columns, device=device)
    positions = torch.cat((text, image.flatten(0, 1)))
    angles = [
        positions[:, axis, None] * _frequencies(width, config.theta, device)
        for axis, width in enumerate(config.axes)
    ]
    angle = torch.cat(angles, dim=-1)
    cosine, sine = angle.cos(), angle.sin()
    return torch.stack((cosine, -sine, sine, cosine), dim=-1).view(*angle.shape, 2, 2)


def timestep_embedding(time: Tensor) -> Tensor:
    """Return cosines and sines [batch, 256] of timesteps [batch], in the dtype of `time`."""
    half = _TIME_CHANNELS // 2
    exponents = torch.arange(half, dtype=torch.float32, device=time.device)
    frequencies = torch.exp(-math.log(_MAX_PERIOD) * exponents / half)
    angles = (1000.0 * time)[:, None].float() * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(time.dtype)


def _frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    return 1.0 / theta**exponents


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=_EPS, elementwise_affine=False)


def _modulated(states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + scale) * states + shift


def _attention(query: Tensor, key: Tensor, value: Tensor, rotary: Tensor) -> Tensor:
    """Return the attention [batch, tokens, width] of heads [batch, heads, tokens, head_width]."""
    result = functional.scaled_dot_product_attention(
        _rotated(query, rotary), _rotated(key, rotary), value
    )
    return result.transpose(1, 2).flatten(2)


def _rotated(heads: Tensor, rotary: Tensor) -> Tensor:
    pairs = heads.float().reshape(*heads.shape[:-1], -1, 1, 2)
    rotated = rotary[..., 0] * pairs[..., 0] + rotary[..., 1] * pairs[..., 1]
    return rotated.flatten(-2).to(heads.dtype)


class _TimeEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_layer = _linear(_TIME_CHANNELS, width)
        self.out_layer = _linear(width, width)

    def forward(self, time: Tensor) -> Tensor:
        result: Tensor = self.out_layer(functional.silu(self.in_layer(time)))
        return result


class _Modulation(nn.Module):
    """Computes shifts, scales and gates, which all blocks of one kind share."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self._count = count
        self.lin = _linear(width, count * width)

    def forward(self, condition: Tensor) -> Sequence[Tensor]:
        """Return tensors [batch, 1, width]: shift, scale and gate of each layer of a block."""
        values: Tensor = self.lin(functional.silu(condition))
        return values[:, None].chunk(self._count, dim=-1)


class _RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, heads: Tensor) -> Tensor:
        values = heads.float()
        factor = torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + _EPS)
        return (values * factor).to(heads.dtype) * self.scale


class _HeadNorms(nn.Module):
    """Norms of queries and keys."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm = _RMSNorm(width)
        self.key_norm = _RMSNorm(width)

    def forward(self, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each [batch, heads, tokens, head_width].

        Args:
            qkv: [batch, tokens, 3 * width].
        """
        split = qkv.reshape(*qkv.shape[:-1], 3, heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind()
        return self.query_norm(query), self.key_norm(key), value


class _Attention(nn.Module):
    """Weights of the attention of one stream; the streams attend to each other."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.qkv = _linear(config.width, 3 * config.width)
        self.norm = _HeadNorms(config.head_width)
        self.proj = _linear(config.width, config.width)


class _GatedSilu(nn.Module):
    def forward(self, states: Tensor) -> Tensor:
        gate, values = states.chunk(2, dim=-1)
        return functional.silu(gate) * values


def _mlp(config: Config) -> nn.Sequential:
    return nn.Sequential(
        _linear(config.width, 2 * config.mlp_width),
        _GatedSilu(),
        _linear(config.mlp_width, config.width),
    )


class _DoubleBlock(nn.Module):
    """Block with separate weights for text and image, and one attention over both."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._heads = config.heads
        self.img_norm1, self.img_norm2 = _norm(config.width), _norm(config.width)
        self.img_attn, self.img_mlp = _Attention(config), _mlp(config)
        self.txt_norm1, self.txt_norm2 = _norm(config.width), _norm(config.width)
        self.txt_attn, self.txt_mlp = _Attention(config), _mlp(config)

    def forward(
        self, image: Tensor, text: Tensor, image_modulation: Sequence[Tensor],
        text_modulation: Sequence[Tensor], rotary: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return the new states of image and text."""
        shift, scale, image_gate, image_shift2, image_scale2, image_gate2 = image_modulation
        qkv = self.img_attn.qkv(_modulated(self.img_norm1(image), shift, scale))
        image_heads = self.img_attn.norm(qkv, self._heads)
        shift, scale, text_gate, text_shift2, text_scale2, text_gate2 = text_modulation
        qkv = self.txt_attn.qkv(_modulated(self.txt_norm1(text), shift, scale))
        text_heads = self.txt_attn.norm(qkv, self._heads)

        query, key, value = (
            torch.cat(pair, dim=2) for pair in zip(text_heads, image_heads, strict=True)
        )
        attended = _attention(query, key, value, rotary)
        of_text, of_image = attended[:, : text.shape[1]], attended[:, text.shape[1] :]

        image = image + image_gate * self.img_attn.proj(of_image)
        modulated = _modulated(self.img_norm2(image), image_shift2, image_scale2)
        image = image + image_gate2 * self.img_mlp(modulated)
        text = text + text_gate * self.txt_attn.proj(of_text)
        modulated = _modulated(self.txt_norm2(text), text_shift2, text_scale2)
        text = text + text_gate2 * self.txt_mlp(modulated)
        return image, text


class _SingleBlock(nn.Module):
    """Block that computes attention and feed-forward layer side by side, on text and image."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._heads, self._width = config.heads, config.width
        self.pre_norm = _norm(config.width)
        self.linear1 = _linear(config.width, 3 * config.width + 2 * config.mlp_width)
        self.norm = _HeadNorms(config.head_width)
        self.mlp_act = _GatedSilu()
        self.linear2 = _linear(config.width + config.mlp_width, config.width)

    def forward(self, states: Tensor, modulation: Sequence[Tensor], rotary: Tensor) -> Tensor:
        """Return the new states [batch, tokens, width]."""
        shift, scale, gate = modulation
        both = self.linear1(_modulated(self.pre_norm(states), shift, scale))
        qkv, hidden = both.tensor_split([3 * self._width], dim=-1)
        query, key, value = self.norm(qkv, self._heads)
        attended = _attention(query, key, value, rotary)
        change = self.linear2(torch.cat((attended, self.mlp_act(hidden)), dim=-1))
        result: Tensor = states + gate * change
        return result


class _FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = _norm(width)
        self.linear = _linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), _linear(width, 2 * width))

    def forward(self, states: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        result: Tensor = self.linear(_modulated(self.norm_final(states), shift, scale))
        return result
