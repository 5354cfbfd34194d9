"""Grouped experts against the dense reference: outputs and gradients, ragged and empty groups."""

import pytest
import torch

from megatron_dynmoe import reference
from megatron_dynmoe.dispatch import combine, dispatch
from megatron_dynmoe.experts import grouped_mlp
from megatron_dynmoe.routing import RoutePlan

T, D, F, E = 33, 16, 24, 5


def maps():
    one = torch.zeros(T, E, dtype=torch.bool)
    one[:, 3] = True
    return {
        "ragged": torch.rand(T, E) < 0.4,
        "all experts": torch.ones(T, E, dtype=torch.bool),
        "one expert": one,
        "no row": torch.zeros(T, E, dtype=torch.bool),
    }


@pytest.mark.parametrize(("name", "offset"), [*((name, 0.0) for name in maps()), ("ragged", 1.0)])
def test_layer_equals_the_dense_reference(name, offset):
    torch.manual_seed(1)
    routing_map = maps()[name]
    tensors = {
        "x": torch.randn(T, D, dtype=torch.float64),
        "weights": torch.where(routing_map, torch.rand(T, E, dtype=torch.float64), 0.0),
        "fc1": torch.randn(E, 2 * F, D, dtype=torch.float64),
        "fc2": torch.randn(E, D, F, dtype=torch.float64),
    }

    def run(dtype, fast):
        x, weights, fc1, fc2 = (t.to(dtype).detach().requires_grad_() for t in tensors.values())
        masked = torch.where(routing_map, weights, weights.new_zeros(()))
        if fast:
            plan = RoutePlan.build(routing_map)
            rows, row_weights, transport = dispatch(x, masked, plan)
            out = combine(grouped_mlp(rows, row_weights, fc1, fc2, plan.rows_per_expert_L, offset=offset), transport, T)
        else:
            out = reference.dense_moe(x, masked, fc1, fc2, offset=offset)
        grads = torch.autograd.grad(out.square().sum(), (x, weights, fc1, fc2))
        return [t.double() for t in (out, *grads)]

    exact, plain, ours = run(torch.float64, False), run(torch.float32, False), run(torch.float32, True)
    for truth, reference_32, fast_32 in zip(exact, plain, ours, strict=True):
        scale = truth.abs().max().clamp_min(1e-30)
        allowed = 2 * (reference_32 - truth).abs().max() + 4 * torch.finfo(torch.float32).eps * scale
        assert (fast_32 - truth).abs().max() <= allowed


def test_no_rows_give_zero_gradients_not_none():
    fc1 = torch.randn(E, 2 * F, D, requires_grad=True)
    fc2 = torch.randn(E, D, F, requires_grad=True)
    out = grouped_mlp(torch.zeros(0, D), torch.zeros(0), fc1, fc2, [0] * E)
    out.sum().backward()
    assert out.shape == (0, D)
    assert fc1.grad.eq(0).all() and fc2.grad.eq(0).all()


@pytest.mark.parametrize("activation", [torch.nn.functional.silu, torch.nn.functional.gelu], ids=["silu", "gelu"])
def test_gated_activation_by_finite_differences(activation):
    from megatron_dynmoe.experts.activation import gated_activation

    hidden = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(7, dtype=torch.float64, requires_grad=True)
    for offset in (0.0, 0.5):
        assert torch.autograd.gradcheck(
            lambda h, w, offset=offset: gated_activation(h, w, activation, offset=offset), (hidden, weights)
        )


def test_gated_activation_in_blocks_and_bfloat16(monkeypatch):
    from megatron_dynmoe.experts import activation

    monkeypatch.setattr(activation, "_ELEMENTS_PER_THREAD", 8)  # a row a block
    hidden = torch.randn(9, 8, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(9, requires_grad=True)
    out = activation.gated_activation(hidden, weights)
    gate, up = hidden.chunk(2, dim=-1)
    plain = ((torch.nn.functional.silu(gate) * up) * weights.unsqueeze(-1)).to(torch.bfloat16)
    assert out.dtype == torch.bfloat16 and torch.equal(out, plain)
    got = torch.autograd.grad(out.float().square().sum(), (hidden, weights))
    wanted = torch.autograd.grad(plain.float().square().sum(), (hidden, weights))
    # the same operations in bfloat16, a rounding or two apart: 2^-8 of the largest
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).abs().max() <= 2**-7 * b.abs().max()


def test_plain_activation():
    fc1, fc2 = torch.randn(2, F, D), torch.randn(2, D, F)
    rows, weights = torch.randn(5, D), torch.rand(5)
    out = grouped_mlp(rows, weights, fc1, fc2, [2, 3], activation=torch.relu, gated=False)
    expected = torch.cat(
        [torch.relu(rows[:2] @ fc1[0].t()) @ fc2[0].t(), torch.relu(rows[2:] @ fc1[1].t()) @ fc2[1].t()]
    )
    # the weight is applied before the second product here and after it there: one more rounding of sums of 24 terms
    assert torch.allclose(out, expected * weights.unsqueeze(1), rtol=1e-4, atol=1e-5)
