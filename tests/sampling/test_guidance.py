"""Guidance: the norm of each row."""

from __future__ import annotations

import torch

from fidelora.sampling.guidance import match_norm


def test_each_row_gets_the_norm_of_the_positive_prediction():
    torch.manual_seed(1)
    guided, positive = torch.randn(2, 5, 64) * 3, torch.randn(2, 5, 64)
    matched = match_norm(guided, positive)
    torch.testing.assert_close(matched.norm(dim=-1), positive.norm(dim=-1))
    angle = torch.nn.functional.cosine_similarity(matched, guided, dim=-1)
    torch.testing.assert_close(angle, torch.ones(2, 5))
