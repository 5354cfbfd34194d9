"""Zero, copy and constant experts: the fused expression against a loop, outputs and gradients, and odd cases."""

import pytest
import torch

from megatron_dynmoe import reference
from megatron_dynmoe.experts import zero_computation
from megatron_dynmoe.experts.zero_computation import _TOKENS

D = 10


def problem(tokens=40, constants=2, copies=1, zeros=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    free = constants + copies + zeros
    chosen = torch.rand(tokens, free, generator=generator) < 0.4
    draw = {
        "x": torch.randn(tokens, D, generator=generator, dtype=dtype),
        "weights": torch.rand(tokens, free, generator=generator, dtype=dtype) * chosen,
        "select": torch.randn(constants, 2, D, generator=generator, dtype=dtype),
        "values": torch.randn(constants, D, generator=generator, dtype=dtype),
    }
    return {name: tensor.requires_grad_() for name, tensor in draw.items()}


@pytest.mark.parametrize(
    ("constants", "copies", "zeros"), [(2, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (6, 1, 1), (0, 2, 0)]
)
def test_equals_the_loop(constants, copies, zeros):
    tensors = problem(constants=constants, copies=copies, zeros=zeros)
    got = zero_computation(*tensors.values(), copies=copies)
    expected = reference.free_experts(*tensors.values(), copies)
    # float64, the same sums of at most eight terms in another order
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(got.shape, dtype=got.dtype)
    expected = expected + 0 * tensors["x"]  # zero experts alone have no gradient to ask for
    for mine, theirs in zip(
        torch.autograd.grad((got * upstream).sum(), list(tensors.values()), allow_unused=True),
        torch.autograd.grad((expected * upstream).sum(), list(tensors.values()), allow_unused=True),
        strict=True,
    ):
        mine, theirs = (torch.zeros(()) if g is None else g for g in (mine, theirs))
        torch.testing.assert_close(mine, theirs.expand_as(mine), rtol=1e-11, atol=1e-12, check_dtype=False)


def test_more_tokens_than_a_block_holds():
    """Two whole blocks and a part: gradients of the experts' parameters are sums over them."""
    tensors = problem(tokens=2 * _TOKENS + 3)
    got, expected = zero_computation(*tensors.values(), copies=1), reference.free_experts(*tensors.values(), 1)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(got.shape, dtype=got.dtype)
    for mine, theirs in zip(
        torch.autograd.grad(got, list(tensors.values()), upstream),
        torch.autograd.grad(expected, list(tensors.values()), upstream),
        strict=True,
    ):
        # float64, sums over two thousand tokens in another order
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_by_hand():
    """One token (3, 4): a constant expert with equal halves and v = (1, 0), a copy, a zero expert."""
    x = torch.tensor([[3.0, 4.0]])
    args = torch.zeros(1, 2, 2), torch.tensor([[1.0, 0.0]])
    out = zero_computation(x, torch.tensor([[0.5, 0.25, 0.25]]), *args, copies=1)
    assert out.tolist() == [[0.5 * (1.5 + 0.5) + 0.25 * 3, 0.5 * 2 + 0.25 * 4]]


def test_no_token_no_choice_and_an_infinite_neighbour():
    tensors = problem()
    assert zero_computation(
        tensors["x"][:0], tensors["weights"][:0], tensors["select"], tensors["values"], copies=1
    ).shape == (0, D)
    nothing = torch.zeros_like(tensors["weights"])
    assert (zero_computation(tensors["x"], nothing, tensors["select"], tensors["values"], copies=1) == 0).all()
    odd = tensors["x"].detach().clone()
    odd[3] = float("inf")
    clean = zero_computation(*tensors.values(), copies=1)
    mixed = zero_computation(odd, *list(tensors.values())[1:], copies=1)
    others = torch.arange(40) != 3
    assert torch.equal(mixed[others], clean[others])


def test_bfloat16_error_is_that_of_rounding():
    tensors = {name: tensor.detach() for name, tensor in problem().items()}
    low = {name: tensor if name == "weights" else tensor.bfloat16() for name, tensor in tensors.items()}
    low["weights"] = low["weights"].float()
    upstream = torch.randn(40, D, generator=torch.Generator().manual_seed(1)).bfloat16()

    def results(compute, dtypes):
        given = [tensor.to(dtype).requires_grad_() for tensor, dtype in zip(low.values(), dtypes, strict=True)]
        out = compute(*given)
        return [out, *torch.autograd.grad(out, given, upstream.to(out.dtype))]

    b, f, d = torch.bfloat16, torch.float32, torch.float64
    got = results(lambda *given: zero_computation(*given, copies=1), [b, f, b, b])
    exact = results(lambda *given: reference.free_experts(*given, 1), [d] * 4)
    plain = results(lambda *given: reference.free_experts(*given, 1), [b] * 4)
    assert [one.dtype for one in got] == [b, b, f, b, b]
    for mine, right, theirs in zip(got, exact, plain, strict=True):
        # twice the error of the plain version in the same dtype
        assert (mine - right).abs().max() <= 2 * (theirs - right).abs().max()
