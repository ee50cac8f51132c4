"""The transformer of Chroma, with the modules and names of the original code.

The order of operations is the trainer's; diffusers' `ChromaTransformer2DModel` rounds differently.
The names of the modules are those of checkpoints and of the trainer's LoRAs.
Source: https://github.com/lodestone-rock/flow, `src/models/chroma`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

_EPS = 1e-6
_ROPE_THETA = 10_000
_TIME_WIDTH = 16  # width of the embeddings of the time and of the guidance
_INDEX_WIDTH = 32  # width of the embedding of a modulation vector's index
_MLP_RATIO = 4


class _RmsNorm(nn.Module):
    """Root mean square norm with a scale per channel."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.scale.shape, weight=self.scale, eps=_EPS)


class _QueryKeyNorm(nn.Module):
    """Norms of queries and keys."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query_norm = _RmsNorm(size)
        self.key_norm = _RmsNorm(size)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


class _Attention(nn.Module):
    """Projections of one stream of a double block."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(size, 3 * size)
        self.norm = _QueryKeyNorm(size // heads)
        self.proj = nn.Linear(size, size)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [batch, heads, tokens, width] of x."""
        q, k, v = _heads(self.qkv(x), self.heads)
        q, k = self.norm(q, k, v)
        return q, k, v


class _DoubleBlock(nn.Module):
    """A block with separate weights for image and text, which attend to each other."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.img_attn = _Attention(size, heads)
        self.img_mlp = _mlp(size)
        self.txt_attn = _Attention(size, heads)
        self.txt_mlp = _mlp(size)

    def forward(
        self, img: Tensor, txt: Tensor, img_mod: Tensor, txt_mod: Tensor, rope: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return new states of image and text.

        Args:
            img_mod, txt_mod: [batch, 6, width]: shift, scale and gate of the attention, then those
                of the MLP.
        """
        img_in = _modulated(img, img_mod[:, 0:1], img_mod[:, 1:2])
        txt_in = _modulated(txt, txt_mod[:, 0:1], txt_mod[:, 1:2])
        pairs = zip(self.txt_attn.project(txt_in), self.img_attn.project(img_in), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in pairs)
        attended = _attention(q, k, v, rope, mask)
        tokens = txt.shape[1]
        img = img + img_mod[:, 2:3] * self.img_attn.proj(attended[:, tokens:])
        img_in = _modulated(img, img_mod[:, 3:4], img_mod[:, 4:5])
        img = img + img_mod[:, 5:6] * self.img_mlp(img_in)
        txt = txt + txt_mod[:, 2:3] * self.txt_attn.proj(attended[:, :tokens])
        txt_in = _modulated(txt, txt_mod[:, 3:4], txt_mod[:, 4:5])
        txt = txt + txt_mod[:, 5:6] * self.txt_mlp(txt_in)
        return img, txt


class _SingleBlock(nn.Module):
    """A block of joined text and image, with attention and MLP side by side."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self._size, self._heads = size, heads
        self.linear1 = nn.Linear(size, (3 + _MLP_RATIO) * size)
        self.linear2 = nn.Linear((1 + _MLP_RATIO) * size, size)
        self.norm = _QueryKeyNorm(size // heads)

    def forward(self, x: Tensor, mod: Tensor, rope: Tensor, mask: Tensor) -> Tensor:
        """Return new states; `mod` [batch, 3, width] has shift, scale and gate."""
        inner = self.linear1(_modulated(x, mod[:, 0:1], mod[:, 1:2]))
        qkv, mlp = inner.split([3 * self._size, _MLP_RATIO * self._size], dim=-1)
        q, k, v = _heads(qkv, self._heads)
        q, k = self.norm(q, k, v)
        attended = _attention(q, k, v, rope, mask)
        joined = torch.cat([attended, functional.gelu(mlp, approximate="tanh")], dim=-1)
        return cast(Tensor, x + mod[:, 2:3] * self.linear2(joined))


class _ApproximatorLayer(nn.Module):
    """Two linear layers with SiLU between them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(size, size)
        self.out_layer = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.out_layer(functional.silu(self.in_layer(x))))


class _Approximator(nn.Module):
    """Network that computes all modulation vectors from the time and their indices."""

    def __init__(self, in_size: int, size: int, out_size: int, depth: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(in_size, size)
        self.layers = nn.ModuleList(_ApproximatorLayer(size) for _ in range(depth))
        self.norms = nn.ModuleList(_RmsNorm(size) for _ in range(depth))
        self.out_proj = nn.Linear(size, out_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        return cast(Tensor, self.out_proj(x))


class _FinalLayer(nn.Module):
    """Modulation and projection of the image's tokens."""

    def __init__(self, size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, out_channels)

    def forward(self, x: Tensor, mod: Tensor) -> Tensor:
        return cast(Tensor, self.linear(_modulated(x, mod[:, 0:1], mod[:, 1:2])))


class ChromaTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Predicts the direction from data to noise.

    Args:
        in_channels: values per token of the image, also of the output.
        context_size: width of the prompt embeddings.
        hidden_size: width of the tokens.
        num_heads: attention heads.
        depth, single_depth: numbers of double and single blocks.
        axes: number of rotary channels per head for each coordinate of a position.
        approximator_size, approximator_depth: width and layers of the network that computes the
            modulation.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 64,
        context_size: int = 4096,
        hidden_size: int = 3072,
        num_heads: int = 24,
        depth: int = 19,
        single_depth: int = 38,
        axes: Sequence[int] = (16, 56, 56),
        approximator_size: int = 5120,
        approximator_depth: int = 5,
    ) -> None:
        super().__init__()
        self._axes = tuple(axes)
        self.img_in = nn.Linear(in_channels, hidden_size)
        self.txt_in = nn.Linear(context_size, hidden_size)
        self.distilled_guidance_layer = _Approximator(
            2 * _TIME_WIDTH + _INDEX_WIDTH, approximator_size, hidden_size, approximator_depth
        )
        self.double_blocks = nn.ModuleList(
            _DoubleBlock(hidden_size, num_heads) for _ in range(depth)
        )
        self.single_blocks = nn.ModuleList(
            _SingleBlock(hidden_size, num_heads) for _ in range(single_depth)
        )
        self.final_layer = _FinalLayer(hidden_size, in_channels)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        txt_mask: Tensor,
        timesteps: Tensor,
    ) -> Tensor:
        """Return the prediction [batch, image tokens, in_channels].

        Args:
            img: tokens of the image [batch, image tokens, in_channels].
            img_ids, txt_ids: positions [tokens, 3], in the dtype of the model.
            txt: prompt embeddings [batch, text tokens, context_size].
            txt_mask: 1 for real tokens, 0 for padding [batch, text tokens], in the dtype of the
                model.
            timesteps: sigma of each image [batch], in the dtype of the model.
        """
        img, txt = self.img_in(img), self.txt_in(txt)
        vectors = self._modulation(timesteps)
        rope = _rope_table(torch.cat([txt_ids, img_ids]), self._axes)
        mask = _attention_mask(txt_mask, img.shape[1])
        singles, doubles = len(self.single_blocks), len(self.double_blocks)
        image_start, text_start = 3 * singles, 3 * singles + 6 * doubles
        for index, block in enumerate(self.double_blocks):
            img_mod = vectors[:, image_start + 6 * index :][:, :6]
            txt_mod = vectors[:, text_start + 6 * index :][:, :6]
            img, txt = block(img, txt, img_mod, txt_mod, rope, mask)
        x = torch.cat([txt, img], dim=1)
        for index, block in enumerate(self.single_blocks):
            x = block(x, vectors[:, 3 * index :][:, :3], rope, mask)
        return cast(Tensor, self.final_layer(x[:, txt.shape[1] :], vectors[:, -2:]))

    def _modulation(self, timesteps: Tensor) -> Tensor:
        """Return all modulation vectors [batch, vectors, hidden_size].

        Three for each single block come first, then six for the image of each double block, six for
        the text of each double block, and two for the final layer.
        """
        count = 3 * len(self.single_blocks) + 12 * len(self.double_blocks) + 2
        index = torch.arange(count, device=timesteps.device)
        time = _sinusoid(timesteps, _TIME_WIDTH)
        guidance = _sinusoid(torch.zeros_like(timesteps), _TIME_WIDTH)
        common = torch.cat([time, guidance], dim=1)[:, None].expand(-1, count, -1)
        indices = _sinusoid(index, _INDEX_WIDTH).to(timesteps.dtype)
        indices = indices[None].expand(len(timesteps), -1, -1)
        return cast(Tensor, self.distilled_guidance_layer(torch.cat([common, indices], dim=-1)))


def _mlp(size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(size, _MLP_RATIO * size),
        nn.GELU(approximate="tanh"),
        nn.Linear(_MLP_RATIO * size, size),
    )


def _sinusoid(values: Tensor, width: int) -> Tensor:
    """Return cosines and sines of `1000 * values` at `width / 2` frequencies.

    Returns:
        [values, width]; in the dtype of floating-point values, else float32.
    """
    scaled = 1000.0 * values
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    frequencies = torch.exp(-math.log(10_000) * steps / half)
    angles = scaled[:, None].float() * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1).to(scaled.dtype)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise states, then scale and shift them."""
    return (1 + scale) * functional.layer_norm(x, x.shape[-1:], eps=_EPS) + shift


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Divide [batch, tokens, 3 * width] into queries, keys, values [batch, heads, tokens, ...]."""
    batch, tokens, _ = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _attention(q: Tensor, k: Tensor, v: Tensor, rope: Tensor, mask: Tensor) -> Tensor:
    """Return the attended values [batch, tokens, heads * width]."""
    q, k = _rotated(q, rope), _rotated(k, rope)
    attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attended.transpose(1, 2).flatten(2)


def _rope_table(ids: Tensor, axes: Sequence[int]) -> Tensor:
    """Return rotation matrices [tokens, width / 2, 2, 2], computed in float64, as float32."""
    tables = []
    for axis, width in enumerate(axes):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=ids.device) / width
        angles = ids[:, axis, None] * (1.0 / _ROPE_THETA**exponents)
        cos, sin = torch.cos(angles), torch.sin(angles)
        tables.append(torch.stack([cos, -sin, sin, cos], dim=-1).view(*cos.shape, 2, 2).float())
    return torch.cat(tables, dim=1)


def _rotated(x: Tensor, table: Tensor) -> Tensor:
    """Rotate pairs of channels of x [batch, heads, tokens, width] in float32."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    rotated: Tensor = table[..., 0] * pairs[..., 0] + table[..., 1] * pairs[..., 1]
    return rotated.flatten(-2).to(x.dtype)


def _attention_mask(txt_mask: Tensor, image_tokens: int) -> Tensor:
    """Return the mask of the attention, bool [batch, 1, tokens, tokens].

    The text takes part with its real tokens and one token of padding, the image with all tokens.
    The real tokens are counted in the dtype of the mask: a sum in bfloat16 is rounded above 256.
    """
    mask = txt_mask.clone()
    for row, count in zip(mask, txt_mask.sum(dim=-1), strict=True):
        row[int(count) : int(count) + 1] = 1
    used = torch.cat([mask.bool(), mask.new_ones(len(mask), image_tokens).bool()], dim=1)
    return (used[:, :, None] & used[:, None, :])[:, None]
