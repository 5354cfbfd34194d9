"""Losses: by hand, against reference.py, shares that add up, gradients."""

import math

import pytest
import torch

from megatron_dynmoe import reference
from megatron_dynmoe.losses import entropy_loss, load_balance_loss, z_loss


def test_load_balance_by_hand():
    # two tokens, two experts; both choose expert 0, one also expert 1: f = [1, 1/2], Q = [.7, .3]
    scores = torch.tensor([[0.8, 0.2], [0.6, 0.4]])
    loss = load_balance_loss(scores, rows_E=torch.tensor([2, 1]), num_tokens=2)
    assert loss.item() == pytest.approx(2 * (1 * 0.7 + 0.5 * 0.3), rel=1e-6)


def test_entropy_by_hand():
    assert entropy_loss(torch.full((3, 4), 0.25), num_tokens=3).item() == pytest.approx(math.log(4), rel=1e-6)
    assert entropy_loss(torch.tensor([[1.0, 0.0]]), num_tokens=1).item() == 0.0


def test_z_loss_by_hand():
    assert z_loss(torch.zeros(5, 8), num_tokens=5).item() == pytest.approx(math.log(8) ** 2, rel=1e-6)


def test_against_the_reference():
    scores = torch.softmax(torch.randn(64, 6, dtype=torch.float64), dim=-1)
    chosen = [reference.top_p_set(row, 0.5) for row in scores.tolist()]
    rows = torch.tensor([sum(e in choice for choice in chosen) for e in range(6)])
    expected = reference.load_balance(scores.tolist(), chosen)
    assert load_balance_loss(scores, rows_E=rows, num_tokens=64).item() == pytest.approx(expected, rel=1e-12)
    assert entropy_loss(scores, num_tokens=64).item() == pytest.approx(reference.entropy(scores.tolist()), rel=1e-12)


def test_shares_of_ranks_add_up_to_the_whole():
    logits = torch.randn(10, 4, dtype=torch.float64)
    scores, rows = torch.softmax(logits, dim=-1), torch.tensor([3, 4, 5, 6])
    for loss in (
        lambda s, x: load_balance_loss(s, rows_E=rows, num_tokens=10),
        lambda s, x: entropy_loss(s, num_tokens=10),
        lambda s, x: z_loss(x, num_tokens=10),
    ):
        shares = loss(scores[:3], logits[:3]) + loss(scores[3:], logits[3:])
        assert shares.item() == pytest.approx(loss(scores, logits).item(), rel=1e-12)


def test_gradients_by_finite_differences():
    scores = torch.softmax(torch.randn(5, 4, dtype=torch.float64), dim=-1).requires_grad_()
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([1, 2, 3, 4])
    assert torch.autograd.gradcheck(lambda s: load_balance_loss(s, rows_E=rows, num_tokens=5), scores)
    assert torch.autograd.gradcheck(lambda s: entropy_loss(s, num_tokens=5), scores)
    assert torch.autograd.gradcheck(lambda x: z_loss(x, num_tokens=5), logits)


def test_no_tokens_and_certain_tokens_have_finite_gradients():
    empty = torch.zeros(0, 4, requires_grad=True)
    assert entropy_loss(empty, num_tokens=1).item() == 0
    certain = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    entropy_loss(certain, num_tokens=1).backward()
    assert certain.grad.isfinite().all()
