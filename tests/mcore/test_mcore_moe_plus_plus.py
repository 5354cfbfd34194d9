"""MoE++ in a layer: equal to the reference; tokens, ranks and steps without a row; what is refused."""

import pytest
import torch

from tests import ranks
from tests.mcore.layers import FREE, B, D, E, S, filled, layer_config, layer_of, plans_of, set_up

Z = 4


def _expected(layer, x, routing_of):
    """Output of the reference for [T, D] tokens of one rank that holds all experts."""
    from megatron_dynmoe import reference

    weights_TE, map_TZ = routing_of(x)
    seen = x * layer.dynmoe.expert_input_scale
    out = reference.dense_moe(seen, weights_TE, layer.experts.weight1, layer.experts.weight2)
    return out + reference.free_experts(seen, map_TZ, layer.free_experts.select, layer.free_experts.values, 1)


def check_layer_against_reference() -> None:
    from megatron_dynmoe.config import ConfigError, DynMoEConfig
    from megatron_dynmoe.routers import route

    set_up()
    cases = [
        ("alltoall", DynMoEConfig(rule="top-k", topk=2, **FREE)),
        ("allgather", DynMoEConfig(rule="top-p", top_p=0.5, **FREE)),
        ("alltoall", DynMoEConfig(gate="cosine", rule="top-any", **FREE)),
        ("alltoall", DynMoEConfig.from_preset("moe-plus-plus-released", gating_residual=False)),
    ]
    for dispatcher, dynmoe in cases:
        layer = filled(layer_of(layer_config(moe_token_dispatcher_type=dispatcher), dynmoe))

        def routing_of(x, layer=layer, dynmoe=dynmoe):
            learned = {name: getattr(layer.router, name) for name in layer.router.learned}
            routing = route(x, layer.router.weight, dynmoe, parameters=learned)
            assert routing.map_TZ.any(dim=0).sum() >= 2 and routing.map_TE.any()
            return routing.weights_TE, routing.weights_TZ

        x = torch.randn(S, B, D, requires_grad=True)
        out, _ = layer(x)
        expected = _expected(layer, x.view(-1, D), routing_of)
        # float32 sums of at most 24 products through two matrices, in another order
        torch.testing.assert_close(out.view(-1, D), expected, rtol=1e-5, atol=1e-5)
        leaves = [x, *layer.parameters()]
        upstream = torch.randn(expected.shape)
        got = torch.autograd.grad((out.view(-1, D) * upstream).sum(), leaves)
        wanted = torch.autograd.grad((expected * upstream).sum(), leaves)
        for mine, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)

    for extra, fields, named in (
        ({"moe_layer_freq": [1, 0]}, {"rule": "top-k", "topk": 9, **FREE}, "8 experts"),
        (
            {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32},
            {"gating_residual": True},
            "shapes|variable",
        ),
        ({"fp32_residual_connection": True}, {"gating_residual": True}, "fp32-residual"),
    ):
        with pytest.raises(ConfigError, match=named):
            layer_of(layer_config(**extra), DynMoEConfig(**fields))


def test_layer_equals_the_reference(tmp_path):
    ranks.call(check_layer_against_reference, ranks=1, folder=tmp_path)


def check_without_rows() -> None:
    """Positive tokens and a router that sends them to free experts, on one rank or on both; gradients are right."""
    import torch.distributed as dist

    from megatron_dynmoe import reference
    from megatron_dynmoe.config import DynMoEConfig

    set_up()
    for unit in ("expert", "rank"):
        for lonely in ([0], [1], [0, 1]):
            dynmoe = DynMoEConfig(rule="top-k", topk=2, dispatch_unit=unit, load_balance_coeff=0.5, **FREE)
            layer = filled(layer_of(layer_config(expert_model_parallel_size=2), dynmoe))
            with torch.no_grad():
                layer.router.weight[:E].abs_().neg_()  # positive tokens avoid FFN experts, negative ones seek them
                layer.router.weight[E:].abs_()
            sign = 1 if dist.get_rank() in lonely else -1
            x = (torch.rand(S, B, D, generator=torch.Generator().manual_seed(dist.get_rank())) + 0.1) * sign
            x.requires_grad_()
            plans = plans_of(layer)
            out, _ = layer(x)
            assert plans[0].rows_sent == (0 if dist.get_rank() in lonely else 2 * S * B)
            out.square().sum().backward()
            weights = layer.experts.weight1.grad
            assert weights is not None and (len(lonely) < 2) == bool(weights.abs().sum() > 0)
            if dist.get_rank() in lonely:
                flat, router = x.detach().view(-1, D).requires_grad_(), layer.router.weight.detach().requires_grad_()
                probs = torch.softmax(flat @ router.t(), dim=-1)
                chosen = torch.zeros(S * B, Z).scatter(1, probs[:, E:].topk(2).indices, 1.0)
                of_experts = layer.free_experts.select, layer.free_experts.values
                expected = reference.free_experts(flat, probs[:, E:] * chosen, *of_experts, 1)
                torch.testing.assert_close(out.view(-1, D), expected, rtol=1e-5, atol=1e-5)
                # The balance loss hangs on the weights of rows, of which there are none here, and still arrives.
                balance = 0.5 * dynmoe.tau * (chosen.mean(dim=0) * probs[:, E:].mean(dim=0)).sum()
                (alone,) = torch.autograd.grad(balance, router, retain_graph=True)
                assert alone.abs().max() > 1e-3  # a hundred times what would pass unnoticed below
                wanted = torch.autograd.grad(expected.square().sum() + balance, (flat, router))
                for mine, theirs in zip((x.grad.view(-1, D), layer.router.weight.grad), wanted, strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_tokens_ranks_and_steps_without_a_row(tmp_path):
    ranks.call(check_without_rows, ranks=2, folder=tmp_path)
