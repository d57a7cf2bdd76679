"""Softmax regression representation learning: how its two parts count, and what does not overflow."""

import pytest
import torch

from raydistill.losses.srrl import srrl

pytestmark = pytest.mark.usefixtures("one_thread")


def test_features_and_logits_count_apart_each_as_a_mean():
    """Every feature off by 2 and every logit off by 3, whatever their number."""
    features, logits = torch.randn(4, 9), torch.randn(4, 3)
    assert srrl(features + 2, logits, features, logits).item() == pytest.approx(4, rel=1e-5)
    assert srrl(features, logits - 3, features, logits).item() == pytest.approx(9, rel=1e-5)
    assert srrl(features + 2, logits - 3, features, logits).item() == pytest.approx(13, rel=1e-5)


def test_what_is_far_apart_does_not_overflow():
    adapted = torch.full((2, 3), 1e4, dtype=torch.float16).requires_grad_()
    loss = srrl(adapted, torch.full((2, 4), 1e4), -adapted.detach(), torch.full((2, 4), -1e4))
    loss.backward()
    assert loss.item() == pytest.approx(8e8)
    assert torch.isfinite(adapted.grad).all()
