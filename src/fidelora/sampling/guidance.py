"""Classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor


def guide(negative: Tensor, positive: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Return the guided prediction, computed in the dtype of its inputs.

    Args:
        negative, positive: predictions [images, ...] for the negative prompts and the prompts.
        scale: guidance scale; 1 would return `positive`.
        rescale: 0..1; weight of a copy of the result that is scaled to the standard deviation of
            `positive`.
    """
    guided = negative + scale * (positive - negative)
    return _rescaled(guided, positive, rescale) if rescale > 0 else guided


def match_norm(guided: Tensor, positive: Tensor) -> Tensor:
    """Scale each row of `guided` (its last dimension) to the Euclidean norm of `positive`.

    Args:
        guided: result of `guide`.
        positive: prediction for the prompts, of the same shape.
    """
    norm, target = (
        torch.linalg.vector_norm(rows, dim=-1, keepdim=True) for rows in (guided, positive)
    )
    matched: Tensor = guided * (target / norm)
    return matched


def _rescaled(guided: Tensor, positive: Tensor, share: float) -> Tensor:
    """Blend `guided` with a copy that is scaled to the standard deviation of `positive`.

    This reduces the overexposure that guidance causes. The order of operations is diffusers'.
    Source: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2023),
    section 3.4.
    """
    each = list(range(1, guided.dim()))  # separately for each image of the batch
    deviation = positive.std(dim=each, keepdim=True) / guided.std(dim=each, keepdim=True)
    return share * (guided * deviation) + (1 - share) * guided
