"""The megatron layer: equal to the reference and to megatron-core's own top-k; what it refuses."""

from functools import partial

import torch

from tests import ranks
from tests.mcore.layers import CAPTURED, B, D, E, S, layer_config, layer_of, plans_of, set_up, stock_spec


def check_layer_against_reference() -> None:
    from megatron_dynmoe import reference
    from megatron_dynmoe.config import DynMoEConfig

    set_up()
    for dispatcher in ("alltoall", "allgather"):
        for p in (0.0, 0.4, 1.0):
            layer = layer_of(layer_config(moe_token_dispatcher_type=dispatcher), DynMoEConfig(top_p=p))
            with torch.no_grad():
                layer.router.weight.normal_()
                layer.experts.weight1.normal_(std=0.3)
                layer.experts.weight2.normal_(std=0.3)
            x = torch.randn(S, B, D)
            out, bias = layer(x)
            assert bias is None
            scores = reference.softmax_scores(x.view(-1, D), layer.router.weight)
            chosen = [reference.top_p_set(row, p) if p < 1 else set(range(E)) for row in scores.tolist()]
            weights = torch.tensor(
                [
                    [s if e in c else 0.0 for e, s in enumerate(row)]
                    for row, c in zip(scores.tolist(), chosen, strict=True)
                ]
            )
            expected = reference.dense_moe(x.view(-1, D), weights, layer.experts.weight1, layer.experts.weight2)
            # float32 sums of at most 24 products, three in a row
            assert torch.allclose(out.view(-1, D), expected, rtol=1e-5, atol=1e-6), (dispatcher, p)


def check_top_k_equals_stock() -> None:
    from megatron_dynmoe.config import DynMoEConfig

    set_up()
    config = layer_config(moe_router_topk=2)
    ours = layer_of(config, DynMoEConfig(rule="top-k", topk=2, expert_backend="sequential"))
    stock = stock_spec(config).submodules.mlp(config=config, layer_number=1)
    stock.set_layer_number(1)
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(S, B, D)
    grads = []
    outs = []
    for layer in (ours, stock):
        inputs = x.clone().requires_grad_()
        out, _ = layer(inputs)
        out.square().sum().backward()
        outs.append(out)
        grads.append([inputs.grad, layer.router.weight.grad, *(p.grad for p in layer.experts.parameters())])
    # the same float32 operations; the sum over a token's two rows has one order
    assert torch.allclose(outs[0], outs[1], rtol=1e-6, atol=1e-7)
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def check_backends_load_each_other() -> None:
    from megatron.core import dist_checkpointing

    from megatron_dynmoe.config import DynMoEConfig

    set_up()
    import tempfile

    x = torch.randn(S, B, D)
    for saver in ("torch", "sequential"):
        for loader in ("torch", "sequential"):
            config = layer_config(glu_linear_offset=0.5)  # as different from 0 as from 1
            first = layer_of(config, DynMoEConfig(expert_backend=saver))
            second = layer_of(config, DynMoEConfig(expert_backend=loader))
            with tempfile.TemporaryDirectory() as folder:
                dist_checkpointing.save(first.sharded_state_dict(prefix="mlp."), folder)
                state = dist_checkpointing.load(second.sharded_state_dict(prefix="mlp."), folder)
            second.load_state_dict({key.removeprefix("mlp."): value for key, value in state.items()})
            # one backend's GEMM of a group against the other's GEMM of the same rows: float32, sums of 24 products
            assert torch.allclose(first(x)[0], second(x)[0], rtol=1e-5, atol=1e-7), (saver, loader)


OVERLAPPED = {"moe_shared_expert_intermediate_size": 8, "moe_shared_expert_overlap": True}


def check_refusals() -> None:
    import pytest

    from megatron_dynmoe.config import ConfigError, DynMoEConfig
    from megatron_dynmoe.mcore.checks import check_config

    set_up()
    refused = [
        ({"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "ncclep"}, {}, "'deepep' or 'hybridep'"),
        ({"moe_expert_capacity_factor": 1.0}, {}, "dropless"),
        ({"cuda_graph_impl": "local"}, {}, "attn"),
        *(
            ({"moe_router_load_balancing_type": kind}, {}, "aux_loss")
            for kind in ("sinkhorn", "seq_aux_loss", "global_aux_loss", "quantile_balancing")
        ),
        ({"moe_router_load_balancing_type": ["seq_aux_loss"], "moe_aux_loss_coeff": [0.0]}, {}, "aux_loss"),
        (
            {"moe_router_load_balancing_type": ["aux_loss", "none"], "moe_aux_loss_coeff": [0.01, 0.0]},
            {"load_balance_coeff": 0.01},
            "aux_loss",
        ),
        (OVERLAPPED | {"glu_linear_offset": 1.0}, {}, "--moe-shared-expert-overlap is True"),
        (OVERLAPPED | {"activation_func_clamp_value": 1.0}, {"expert_backend": "sequential"}, "--moe-shared-expert-ov"),
        ({"moe_router_dtype": "fp64"}, {}, "--moe-router-dtype is 'fp64'"),
        ({"add_bias_linear": True}, {"expert_backend": "sequential"}, "--disable-bias-linear is False"),
        ({"mlp_chunks_for_training": 2}, {"gating_residual": True}, "--mlp-chunks-for-training is 2"),
        ({"mlp_chunks_for_prefill": 2}, {"gating_residual": True}, "--mlp-chunks-for-prefill is 2"),
        (CAPTURED, {"zero_experts": 1}, "zero-computation"),
        (CAPTURED, {"gate": "cosine", "rule": "top-any", "adaptive_experts": True}, "--moe-adaptive-experts"),
        (CAPTURED | {"moe_shared_expert_intermediate_size": 8}, {"residual": True}, "--moe-residual"),
        ({"moe_router_score_function": "sigmoid"}, {}, "--moe-gate"),
        ({"moe_router_topk": 3}, {"rule": "top-k", "topk": 2}, "DynMoEConfig.topk"),
        ({}, {"rule": "top-k", "topk": 9}, "1 to 4"),
        ({}, {"expert_backend": "te"}, "Transformer Engine"),
    ]
    for theirs, ours, wanted in refused:
        with pytest.raises(Exception) as refusal:  # building a layer through a spec may wrap the error
            layer_of(layer_config(**theirs), DynMoEConfig(**ours))
        message = str(refusal.value)
        assert isinstance(refusal.value, ConfigError), message
        assert wanted in message and "--" in message and "\n" not in message, message
    check_config(layer_config(**CAPTURED), DynMoEConfig())
    check_config(layer_config(mlp_chunks_for_training=2, moe_router_dtype="fp32"), DynMoEConfig())


def check_no_balancing() -> None:
    """With the balancing type "none" the load-balance loss is off, and the other losses are not."""
    from megatron_dynmoe.config import DynMoEConfig

    set_up()
    gradients = {}
    for kind in ("aux_loss", "none", ["none"]):
        for other in (0.0, 1.0):
            dynmoe = DynMoEConfig(load_balance_coeff=1.0, entropy_coeff=other)
            coeff = [1.0] if isinstance(kind, list) else 1.0
            layer = layer_of(layer_config(moe_router_load_balancing_type=kind, moe_aux_loss_coeff=coeff), dynmoe)
            routing = layer.router(torch.randn(S, B, D, generator=torch.Generator().manual_seed(1)))
            routing.weights_TE.sum().mul(0).backward()  # nothing but the losses
            gradients[str(kind), other] = bool(layer.router.weight.grad.any())
    assert gradients == {
        ("aux_loss", 0.0): True,
        ("aux_loss", 1.0): True,
        ("none", 0.0): False,
        ("none", 1.0): True,
        ("['none']", 0.0): False,
        ("['none']", 1.0): True,
    }


def check_router_without_bias() -> None:
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_dynmoe.config import DynMoEConfig
    from megatron_dynmoe.mcore.router import DynamicRouter

    set_up()
    config = layer_config(add_bias_linear=True)
    router = DynamicRouter(config, get_default_pg_collection(), dynmoe=DynMoEConfig())
    router.set_layer_number(1)
    router(torch.randn(S, B, D)).weights_TC.sum().backward()
    assert {name for name, parameter in router.named_parameters() if parameter.grad is None} == set()


def test_every_parameter_of_the_router_is_used_with_biases_elsewhere(tmp_path):
    ranks.call(check_router_without_bias, ranks=1, folder=tmp_path)


def check_bare_layer_is_on_the_device() -> None:
    """What is made on the CPU goes where ``Tensor.cuda`` says, here the meta device, before the layer is used."""
    from megatron_dynmoe.config import DynMoEConfig

    set_up()
    cosine = {"gate": "cosine", "rule": "top-any"}
    cases = [{"copy_experts": 1}, {"constant_experts": 1, "residual": True}, cosine | {"adaptive_experts": True}]
    torch.Tensor.cuda = lambda tensor, *_: tensor.to(device="meta")
    for fields in cases:
        for on_cpu in (False, True):
            config = layer_config(moe_shared_expert_intermediate_size=8, use_cpu_initialization=on_cpu)
            layer = layer_of(config, DynMoEConfig(**fields))
            for module in filter(None, (layer.router, layer.mixer, layer.free_experts)):
                tensors = [*module.parameters(), *module.buffers()]
                assert tensors and {t.device.type for t in tensors} == {"cpu" if on_cpu else "meta"}, fields


def test_a_bare_layer_is_on_the_device(tmp_path):
    ranks.call(check_bare_layer_is_on_the_device, ranks=1, folder=tmp_path)


def check_one_wait_a_pass() -> None:
    """The points where the host waits for a CUDA device, patched and counted over forward and backward of a layer."""
    from megatron_dynmoe.config import DynMoEConfig
    from megatron_dynmoe.experts.grouped import grouped_linear

    set_up()
    blocking = ("tolist", "item", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__", "numpy")
    for unit in ("expert", "rank"):
        layer = layer_of(layer_config(), DynMoEConfig(dispatch_unit=unit, load_balance_coeff=0.01, entropy_coeff=0.01))
        # as on a GPU: experts on a CPU read the rows of each, which the dispatcher hands over on the host
        type(layer.experts).linears = grouped_linear, grouped_linear
        x = torch.randn(S, B, D, requires_grad=True)
        layer(x)[0].sum().backward()  # once before, so that nothing of a first call is counted
        waits: list[str] = []
        originals = {name: getattr(torch.Tensor, name) for name in blocking}
        for name, original in originals.items():

            def counted(self, *args, _original=original, _name=name, _waits=waits, **kwargs):
                _waits.append(_name)
                return _original(self, *args, **kwargs)

            setattr(torch.Tensor, name, counted)
        try:
            out, _ = layer(x)
            forward = list(waits)
            out.sum().backward()
        finally:
            for name, original in originals.items():
                setattr(torch.Tensor, name, original)
        assert forward == ["tolist"], (unit, forward)
        assert waits == forward, (unit, waits)  # the backward pass needs none: it walks the forward's plan


def _recorded(sizes, experts, rows, counts, weights):
    sizes.append(counts)
    return experts(rows, counts, weights)


def check_alignment() -> None:
    """Groups come in multiples; map, plan, counters and output are those without alignment."""
    from megatron_dynmoe.config import DynMoEConfig
    from megatron_dynmoe.mcore import dispatcher

    set_up()
    for unit in ("expert", "rank"):
        config = layer_config()
        layer = layer_of(config, DynMoEConfig(top_p=0.5, expert_backend="sequential", dispatch_unit=unit))
        x = torch.randn(S, B, D, requires_grad=True)
        plain, _ = layer(x)
        plain_grads = torch.autograd.grad(plain.square().sum(), (x, layer.router.weight))
        config.moe_router_padding_for_quantization = True  # megatron accepts it with FP8 only, which needs a GPU
        dispatcher.get_align_size_for_quantization = lambda config: 16
        sizes = []
        experts = layer.experts.forward
        layer.experts.forward = partial(_recorded, sizes, experts)
        map_TE = layer.router(x).map_TE
        before = map_TE.clone()
        plans = plans_of(layer)
        aligned, _ = layer(x)
        grads = torch.autograd.grad(aligned.square().sum(), (x, layer.router.weight))
        assert torch.equal(map_TE, before)
        (plan,) = plans
        assert plan.rows_sent == int(before.sum())
        assert sizes[0].tolist() == [-(-n // 16) * 16 for n in plan.rows_per_expert_L]
        for got, wanted in zip((aligned, *grads), (plain, *plain_grads), strict=True):
            # the same rows in GEMMs of another height, which may sum their 24 products in another order
            assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-7)


def test_alignment_for_fp8_touches_neither_map_nor_counts(tmp_path):
    ranks.call(check_alignment, ranks=1, folder=tmp_path)


def check_shared_experts_run_while_rows_travel() -> None:
    from megatron_dynmoe.config import DynMoEConfig
    from megatron_dynmoe.dispatch.moves import Exchange
    from megatron_dynmoe.mcore.layer import DynMoELayer

    set_up()
    config = layer_config(expert_model_parallel_size=2, moe_shared_expert_intermediate_size=8)
    layer = layer_of(config, DynMoEConfig(top_p=0.5))
    events: list[str] = []
    launch, land, local = Exchange.launch, Exchange.land, DynMoELayer.local_compute

    def logged(name, function):
        def run(*args):
            events.append(name)
            return function(*args)

        return run

    Exchange.launch, Exchange.land = logged("start", launch), logged("wait", land)
    DynMoELayer.local_compute = logged("local", local)
    x = torch.randn(S, B, D)
    out, _ = layer(x)
    # rows and weights leave, the shared experts compute, both arrive; then the outputs go back
    assert events == ["start", "start", "local", "wait", "wait", "start", "wait"], events
    Exchange.launch, Exchange.land, DynMoELayer.local_compute = launch, land, local
    shared = layer.shared_experts_compute(x)  # megatron-core's order: shared experts first, then the dispatch
    rows = layer.dispatch(*layer.preprocess(x, *layer.route(x)))
    assert torch.equal(layer.postprocess(layer.combine(layer.routed_experts_compute(*rows)[0]), shared), out)


def test_shared_experts_run_while_rows_travel(tmp_path):
    ranks.call(check_shared_experts_run_while_rows_travel, ranks=2, folder=tmp_path)


def test_layer_equals_the_dense_reference(tmp_path):
    ranks.call(check_layer_against_reference, ranks=1, folder=tmp_path)


def test_top_k_equals_megatron_core(tmp_path):
    ranks.call(check_top_k_equals_stock, ranks=1, folder=tmp_path)


def test_a_checkpoint_moves_between_expert_backends(tmp_path):
    ranks.call(check_backends_load_each_other, ranks=1, folder=tmp_path)


def test_the_host_waits_once_a_layer_and_pass(tmp_path):
    ranks.call(check_one_wait_a_pass, ranks=1, folder=tmp_path)


def test_no_load_balancing_is_none(tmp_path):
    ranks.call(check_no_balancing, ranks=1, folder=tmp_path)


def test_what_cannot_work_is_refused_at_construction(tmp_path):
    ranks.call(check_refusals, ranks=1, folder=tmp_path)
