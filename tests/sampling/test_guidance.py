"""Classifier-free guidance, rescaled to the norm of the positive prediction."""

from __future__ import annotations

import torch

from fidelora.sampling.guidance import guide, match_norm


def test_the_norm_of_each_row_is_that_of_the_positive_prediction():
    generator = torch.Generator().manual_seed(3)
    negative, positive = torch.randn(2, 1, 4, 6, 8, generator=generator)
    guided = guide(negative, positive, 4.0)
    matched = match_norm(guided, positive)
    torch.testing.assert_close(matched.norm(dim=-1), positive.norm(dim=-1))
    torch.testing.assert_close(  # only the norm changes, not the direction
        torch.nn.functional.normalize(matched, dim=-1),
        torch.nn.functional.normalize(guided, dim=-1),
    )
    assert not torch.allclose(guided.norm(dim=-1), positive.norm(dim=-1))
