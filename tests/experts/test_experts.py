"""Grouped experts against the dense reference: outputs and gradients, ragged and empty groups."""

import pytest
import torch

from megatron_dynmoe import reference
from megatron_dynmoe.dispatch import combine, dispatch
from megatron_dynmoe.experts import grouped_mlp
from megatron_dynmoe.routing import RoutePlan
from tests import ranks

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_the_fused_activation_is_ours(dtype, rows):
    """megatron-core's functions, not compiled: on a GPU they are one kernel each way and round less often."""
    from megatron_dynmoe.experts.activation import gated_activation
    from megatron_dynmoe.mcore.experts import _weighted_swiglu

    torch.manual_seed(2)
    values = torch.randn(rows, 2 * F).to(dtype), torch.rand(rows), torch.randn(rows, F).to(dtype)

    def run(function, wide):
        hidden, weights, grad = (value.to(wide or value.dtype) for value in values)
        hidden, weights = hidden.requires_grad_(), weights.requires_grad_()
        with torch.compiler.set_stance("force_eager"):
            out = function(hidden, weights)
            grads = torch.autograd.grad(out, (hidden, weights), grad)
        return out, *grads

    exact, ours = run(gated_activation, torch.float64), run(gated_activation, None)
    for truth, plain, fused in zip(exact, ours, run(_weighted_swiglu, None), strict=True):
        assert (fused.dtype, fused.shape) == (plain.dtype, plain.shape)
        if rows:  # twice our own error, and two roundings where that happens to be 0
            allowed = 2 * (plain.double() - truth).abs().max() + 2 * torch.finfo(dtype).eps * truth.abs().max()
            assert (fused.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("change", ["", "bias_activation_fusion", "activation_func", "glu_linear_offset"])
def test_fused_activation_where_it_is_the_models(change):
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dynmoe.mcore.experts import _weighted_swiglu, fused_activation, why_not_torch

    fields = {"activation_func": torch.nn.functional.silu, "gated_linear_unit": True, "add_bias_linear": False}
    fields |= {"num_moe_experts": 2, "moe_ffn_hidden_size": 32}
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=1, **fields)
    config.bias_activation_fusion = True
    if change:
        others = {"bias_activation_fusion": False, "activation_func": torch.relu, "glu_linear_offset": 1.0}
        setattr(config, change, others[change])
    assert fused_activation(config) is (None if change else _weighted_swiglu)
    assert why_not_torch(config) is None
    config.activation_func_fp8_input_store = True
    assert "activation_func_fp8_input_store" in why_not_torch(config)


@pytest.mark.parametrize(("device", "rows", "taken"), [("cpu", 5, False), ("meta", 5, True), ("meta", 0, False)])
def test_fused_activation_is_for_rows_on_a_gpu(device, rows, taken):
    """The meta device stands for one; what is kept for backward is D + 3F numbers a row, and its weight."""
    from megatron_dynmoe.mcore.experts import _weighted_swiglu

    calls, kept = [], {}

    def fused(hidden, weights):
        calls.append(hidden.shape)
        return _weighted_swiglu(hidden, weights)

    as_rows = {"device": device, "dtype": torch.bfloat16}  # the dtype in which the meta device knows the grouped GEMM
    x, row_weights = torch.randn(rows, D, **as_rows), torch.rand(rows, device=device)
    weights = torch.randn(2, 2 * F, D, **as_rows), torch.randn(2, D, F, **as_rows)
    leaves = [tensor.requires_grad_() for tensor in (x, row_weights, *weights)]
    counts = torch.tensor([rows, 0], device=device)
    keep = lambda tensor: kept.setdefault(id(tensor.untyped_storage()), tensor)  # noqa: E731
    with torch.compiler.set_stance("force_eager"), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = grouped_mlp(x, row_weights, *weights, counts, fused=fused)
    with torch.compiler.set_stance("force_eager"):
        out.sum().backward()
    assert bool(calls) == taken and all(leaf.grad is not None for leaf in leaves)
    if taken:
        numbers = sum(t.numel() for t in kept.values() if t.is_floating_point() and t.dim() < 3)
        assert numbers == rows * (D + 3 * F + 1)


def check_layer_hands_it_over() -> None:
    from megatron_dynmoe.config import DynMoEConfig
    from megatron_dynmoe.mcore import experts
    from tests.mcore.layers import layer_config, layer_of, set_up

    set_up()
    calls = []
    kernel = experts.weighted_bias_swiglu_impl
    experts.weighted_bias_swiglu_impl = lambda *args: calls.append(1) or kernel(*args)
    layer = layer_of(layer_config(), DynMoEConfig(expert_backend="torch"))
    layer.config.bias_activation_fusion = True
    mlp = layer.experts.to("meta")
    mlp.to(torch.bfloat16)
    rows = torch.randn(5, mlp.weight1.shape[2], device="meta", dtype=torch.bfloat16)
    counts = torch.zeros(mlp.num_local_experts, dtype=torch.int64, device="meta")
    mlp(rows, counts, torch.rand(5, device="meta"))
    assert calls == [1]


def test_the_layer_hands_the_fused_activation_over(tmp_path):
    ranks.call(check_layer_hands_it_over, ranks=1, folder=tmp_path)


def test_plain_activation():
    fc1, fc2 = torch.randn(2, F, D), torch.randn(2, D, F)
    rows, weights = torch.randn(5, D), torch.rand(5)
    out = grouped_mlp(rows, weights, fc1, fc2, [2, 3], activation=torch.relu, gated=False)
    expected = torch.cat(
        [torch.relu(rows[:2] @ fc1[0].t()) @ fc2[0].t(), torch.relu(rows[2:] @ fc1[1].t()) @ fc2[1].t()]
    )
    # the weight is applied before the second product here and after it there: one more rounding of sums of 24 terms
    assert torch.allclose(out, expected * weights.unsqueeze(1), rtol=1e-4, atol=1e-5)
