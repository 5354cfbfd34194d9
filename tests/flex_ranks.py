"""Ranks of tests/mcore/test_flex.py: layers with the flex dispatcher beside the same layers with alltoall."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist

from tests import deep_ep_standin
from tests.mcore.layers import FREE, B, D, E, F, S, filled, layer_config, layer_of

PRESETS = [
    ("dynamic-moe", {}),
    ("dynamic-moe", {"gating_residual": True}),
    ("switch", {}),
    ("gshard", {}),
    ("dynmoe", {}),
    ("moe-plus-plus", {}),
    ("moe-plus-plus-released", {"max_experts_per_token": 2}),
]
SHARED = {"moe_shared_expert_intermediate_size": 8}
EP2 = {"expert_model_parallel_size": 2}
BACKENDS = ("deepep", "hybridep")


def setup(
    tensor: int = 1,
    expert: int = 2,
    expert_tensor: int | None = None,
    *,
    transport: str = "gloo",
    library: Callable[[], None] | None = deep_ep_standin.install,
) -> None:
    """Ranks and groups; ``library`` puts a stand-in where megatron-core looks for ``deep_ep``."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if library is not None:
        library()
    dist.init_process_group(transport)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
    )
    model_parallel_cuda_manual_seed(1)


def together(check: str, *args: int) -> None:
    """Run a check; no rank ends, and takes the store of the first one along, before all are done."""
    globals()[f"check_{check}"](*args)
    dist.barrier()


def flex(backend: str) -> dict:
    return {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": backend}


def results(layer, x, previous=None) -> list[torch.Tensor]:
    """Outputs in training and evaluation, every gradient, and what was counted."""
    from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker

    from megatron_dynmoe.mcore.tracker import RoutingTracker

    dynmoe = layer.dynmoe
    kinds = {kind: getattr(dynmoe, f"{kind}_experts") for kind in ("constant", "copy", "zero")}
    set_moe_metrics_tracker(tracker := RoutingTracker(num_layers=1, num_experts=E, kinds=kinds))
    leaves = [x, *layer.parameters()] + ([] if previous is None else [previous])
    layer.train()
    out, _, *logits = layer(x, previous=previous)
    whole = torch.cat([out, *logits], dim=-1)
    upstream = torch.randn(whole.shape, generator=torch.Generator().manual_seed(3 + dist.get_rank()))
    gradients = torch.autograd.grad((whole * upstream.to(whole)).sum(), leaves, allow_unused=True)
    losses = [entry.values for _, entry in sorted(tracker.metrics.items())]
    counted = [tracker.stats.counts.clone(), torch.tensor([int(tracker.stats.traffic.rows)])]
    layer.eval()
    with torch.no_grad():
        still, *_ = layer(x, previous=previous)
    return [whole, still, *counted, *losses, *(torch.zeros(()) if grad is None else grad for grad in gradients)]


def inputs(layer, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7 + dist.get_rank())
    x = torch.randn(S, B, D, generator=generator).to(layer.router.weight.device, dtype).requires_grad_()
    if not layer.dynmoe.gating_residual:
        return x, None
    return x, torch.randn(S, B, layer.router.columns, generator=generator, requires_grad=True)


def close(got, wanted, what) -> None:
    assert len(got) == len(wanted) > 5
    for place, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        # float32: a token's rows are summed rank by rank and not at once; sums of at most 24 products beside that
        message = partial("{} {}: {}".format, what, place)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5, msg=message)


def check_presets() -> None:
    """Each preset: flex equals alltoall with a row on the wire for each rank, and its rows are counted alike."""
    from megatron_dynmoe.config import DynMoEConfig

    setup()
    for preset, extra in PRESETS:
        dynmoe = DynMoEConfig.from_preset(preset, dispatch_unit="rank", z_loss_coeff=0.1, **extra)
        for shared in (SHARED, SHARED | {"moe_shared_expert_overlap": True}):
            wanted = None
            for kind in ({}, *map(flex, BACKENDS)):
                layer = filled(layer_of(layer_config(**EP2, **kind, **shared), dynmoe))
                got = results(layer, *inputs(layer))
                wanted = wanted or got
                close(got, wanted, (preset, shared, kind))


def check_reference() -> None:
    """Each rank's output is the dense reference's, with experts from both ranks."""
    from megatron_dynmoe import reference
    from megatron_dynmoe.config import DynMoEConfig
    from megatron_dynmoe.routers import route

    setup()
    for dynmoe in (DynMoEConfig(top_p=0.5), DynMoEConfig(rule="top-k", topk=3, expert_input_scale=2.0, **FREE)):
        for backend in BACKENDS:
            layer = filled(layer_of(layer_config(**EP2, **flex(backend)), dynmoe)).eval()
            x, _ = inputs(layer)
            learned = {name: getattr(layer.router, name) for name in layer.router.learned}
            routing = route(x.view(-1, D), layer.router.weight, dynmoe, parameters=learned)
            stacked = []
            for weight in (layer.experts.weight1, layer.experts.weight2):
                every = [torch.empty_like(weight) for _ in range(2)]
                dist.all_gather(every, weight.detach())
                stacked.append(torch.cat(every))
            seen = x.view(-1, D) * dynmoe.expert_input_scale
            expected = reference.dense_moe(seen, routing.weights_TE, *stacked)
            if layer.free_experts is not None:
                of_experts = layer.free_experts.select, layer.free_experts.values
                expected = expected + reference.free_experts(seen, routing.weights_TZ, *of_experts, 1)
            # float32 sums of at most 24 products through two matrices, in another order
            torch.testing.assert_close(layer(x)[0].view(-1, D), expected, rtol=1e-5, atol=1e-5)


def maps() -> dict[str, torch.Tensor]:
    """bool [T, E] of this rank; experts 0 and 1 are on rank 0."""
    tokens, rank = S * B, dist.get_rank()
    nowhere = torch.zeros(tokens, E, dtype=torch.bool)
    everywhere = ~nowhere
    last, first = nowhere.clone(), nowhere.clone()
    last[:, 3] = True
    first[:, :2] = True
    ragged = torch.rand(tokens, E, generator=torch.Generator().manual_seed(11 + rank)) < 0.4
    ragged[::3] = False
    return {
        "no rows anywhere": nowhere,
        "a rank without rows": first,
        "a rank without choices": nowhere if rank else everywhere,
        "all to one expert": last,
        "every expert": everywhere,
        "tokens without experts": ragged,
        "one token": everywhere[:1],
        "one token without experts": nowhere[:1],
    }


def routed(map_TE, W):
    """A router's decision with that map; weights depend on the input, and one of them is exactly 0, as by underflow."""
    from megatron_dynmoe.routers.routing import Routing

    def routing(x_TD, previous_TC=None):
        scores = (x_TD @ W).sigmoid()
        weights = torch.where(map_TE, scores, 0.0)
        zero = (torch.arange(weights.numel()) == 3).view_as(weights)
        weights = weights - torch.where(zero, weights, 0.0).detach()
        none = torch.zeros((), dtype=torch.int64)
        return Routing(weights, map_TE, scores, scores, map_TE.shape[1], none, none)

    return routing


def check_extremes() -> None:
    from megatron_dynmoe.config import DynMoEConfig

    setup()
    W = torch.randn(D, E, generator=torch.Generator().manual_seed(2))
    for name, map_TE in maps().items():
        wanted = None
        for kind in ({}, *map(flex, BACKENDS)):
            layer = filled(layer_of(layer_config(**EP2, **kind), DynMoEConfig(dispatch_unit="rank")))
            layer.router.routing = routed(map_TE, W)
            x = inputs(layer)[0].detach().view(-1, 1, D)[: len(map_TE)].clone().requires_grad_()
            got = results(layer, x)
            wanted = wanted or got
            close(got, wanted, (name, kind))


def check_cap() -> None:
    """K is the cap: choices beyond it are said, those within fill [T, K] with -1 and 0 behind them."""
    from megatron_dynmoe.config import DynMoEConfig

    setup()
    layer = filled(layer_of(layer_config(**EP2, **flex("deepep")), DynMoEConfig(top_p=1.0, max_experts_per_token=2)))
    manager = type(layer.token_dispatcher._comm_manager)
    seen = []
    setup_metadata = manager.setup_metadata

    def watched(copied, *args):
        setup_metadata(copied, *args)
        seen.append((copied.token_indices, copied.token_probs))

    manager.setup_metadata = watched
    x, _ = inputs(layer)
    layer(x)
    (indices, weights) = seen.pop()
    assert indices.shape == weights.shape == (S * B, 2) and (indices >= 0).all()
    few = torch.zeros(S * B, E, dtype=torch.bool)
    few[0, 3], few[1, 1], few[1, 2] = True, True, True
    layer.router.routing = routed(few, torch.zeros(D, E))
    layer(x)
    (indices, weights) = seen.pop()
    assert indices[0].tolist() == [-1, -1] or indices[0].tolist() == [3, -1]
    assert sorted(indices[1].tolist()) == [1, 2] and (indices[2:] == -1).all()
    assert weights[0].tolist() == [0, 0] and weights[1].tolist() == [0.5, 0.5] and not weights[2:].any()
    few[2, :3] = True
    with pytest.raises(RuntimeError, match="more than the 2 experts that DeepEP was prepared for"):
        layer(x)


def check_layout(tensor: int, expert: int, expert_tensor: int) -> None:
    """Tensor-parallel ranks see different tokens (sequence parallelism), expert-tensor-parallel ones share experts."""
    from megatron_dynmoe.config import DynMoEConfig

    setup(tensor, expert, expert_tensor)
    sizes = {
        "tensor_model_parallel_size": tensor,
        "expert_model_parallel_size": expert,
        "expert_tensor_parallel_size": expert_tensor,
        "sequence_parallel": True,
    }
    for dynmoe in (
        DynMoEConfig(top_p=0.5, load_balance_coeff=0.1, dispatch_unit="rank"),
        DynMoEConfig.from_preset("moe-plus-plus", dispatch_unit="rank"),
    ):
        wanted = None
        for kind in ({}, *map(flex, BACKENDS)):
            layer = filled(layer_of(layer_config(**sizes, **kind, **SHARED), dynmoe))
            got = results(layer, *inputs(layer))
            if wanted is None:
                wanted = got
            got[3] = wanted[3]  # rows on the wire: with alltoall the tensor-parallel ranks gather what one has received
            close(got, wanted, kind)


def check_bfloat16() -> None:
    setup()
    compare_bfloat16(*BACKENDS)


def compare_bfloat16(*backends: str) -> None:
    """Flex beside alltoall in the dtype of the real libraries, on whatever device layers are built."""
    from megatron_dynmoe.config import DynMoEConfig

    half = {"params_dtype": torch.bfloat16, "bf16": True}
    wanted = None
    for kind in ({}, *map(flex, backends)):
        layer = filled(layer_of(layer_config(**EP2, **kind, **half), DynMoEConfig(top_p=0.5, dispatch_unit="rank")))
        x, _ = inputs(layer, torch.bfloat16)
        got = results(layer, x)
        wanted = wanted or got
        for mine, theirs in zip(got, wanted, strict=True):
            # a rank's sum of a token's rows is rounded before ranks are summed: half a step of 2^-8 of the largest,
            # twice through two matrices
            error = (mine.float() - theirs.float()).abs().max()
            assert mine.dtype == theirs.dtype and error <= 2**-7 * theirs.float().abs().max(), (kind, error)


def check_padding() -> None:
    """Rows aligned for FP8: groups in multiples, outputs and gradients as without."""
    from megatron.core.transformer.moe import token_dispatcher

    from megatron_dynmoe.config import DynMoEConfig
    from megatron_dynmoe.mcore import flex as module

    setup()
    dynmoe = DynMoEConfig(top_p=0.5, expert_backend="sequential")
    for backend in BACKENDS:
        config = layer_config(**EP2, **flex(backend))
        layer = filled(layer_of(config, dynmoe))
        x, _ = inputs(layer)
        plain = results(layer, x)
        if backend == "deepep":
            config.moe_router_padding_for_quantization = True  # megatron accepts it with FP8 only, which needs a GPU
            token_dispatcher.get_align_size_for_quantization = lambda config: 4
            module.get_align_size_for_quantization = lambda config: 4
        else:
            layer.token_dispatcher._comm_manager.pad_multiple = 4  # as dispatch() sets it with FP8
        sizes, experts = [], layer.experts.forward

        def recorded(rows, counts, weights, sizes=sizes, experts=experts):
            sizes.append(counts.tolist())
            assert len(rows) == len(weights) == sum(sizes[-1]) and not rows[weights == 0].any()
            return experts(rows, counts, weights)

        layer.experts.forward = recorded
        close(results(layer, x), plain, backend)
        assert sizes and all(size % 4 == 0 for size in sizes[0]) and any(sizes[0]), sizes
        sizes.clear()  # fewer tokens than a group's multiple
        layer(x[:1])
        assert len(sizes) == 1 and all(size % 4 == 0 for size in sizes[0]), sizes


def check_empty_is_not_fused() -> None:
    """Transformer Engine's fused permutation asserts a row: with none, megatron's own is taken."""
    from megatron.core.transformer.moe import token_dispatcher

    from megatron_dynmoe.config import DynMoEConfig

    setup()
    asked, permute, unpermute = [], token_dispatcher.permute, token_dispatcher.unpermute

    def plain(function, *args, fused, **kwargs):
        asked.append(fused)
        return function(*args, fused=False, **kwargs)

    token_dispatcher.permute = partial(plain, permute)
    token_dispatcher.unpermute = partial(plain, unpermute)
    config = layer_config(**EP2, **flex("deepep"))
    layer = filled(layer_of(config, DynMoEConfig()))
    config.moe_permute_fusion = True
    x, _ = inputs(layer)
    for name, wanted in (("no rows anywhere", False), ("every expert", True)):
        layer.router.routing = routed(maps()[name], torch.zeros(D, E))
        layer(x)
        assert asked == [wanted, wanted], (name, asked)
        asked.clear()


def check_uneven_tokens() -> None:
    """Different numbers of tokens: DeepEP takes them, HybridEP with padding, and without it says so on each rank."""
    from megatron_dynmoe.config import ConfigError, DynMoEConfig

    setup()
    dynmoe = DynMoEConfig(top_p=0.5, dispatch_unit="rank")
    padded = flex("hybridep") | {"moe_hybridep_pad_uneven_dispatch_inputs": True}
    padded |= {"moe_permute_fusion_into_hybridep": True, "moe_flex_dispatcher_num_sms": 16}
    wanted = None
    for kind in ({}, flex("deepep"), padded):
        layer = filled(layer_of(layer_config(**EP2, **kind), dynmoe))
        x = inputs(layer)[0].detach()[: S - 2 * dist.get_rank()].clone().requires_grad_()
        got = results(layer, x)
        wanted = wanted or got
        close(got, wanted, kind)
    layer = filled(layer_of(layer_config(**EP2, **flex("hybridep")), dynmoe))
    layer(torch.randn(S, B, D))
    second = layer_of(layer.config, dynmoe)  # of the same model: one look a pass is enough
    assert layer.token_dispatcher._watches and not second.token_dispatcher._watches
    with pytest.raises(ConfigError, match=r"--moe-hybridep-pad-uneven-dispatch-inputs is False.* 8 to 12"):
        layer(torch.randn(S - 2 * dist.get_rank(), B, D))
    layer(torch.randn(S - 1, B, D))


def check_many_tokens_between_nodes() -> None:
    from megatron_dynmoe.config import ConfigError, DynMoEConfig
    from megatron_dynmoe.mcore.flex_checks import check_tokens, ranks_per_node

    setup()
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    group = dist.group.WORLD
    config = layer_config(**EP2, **flex("hybridep"))
    assert ranks_per_node(group) == 1
    check_tokens(21824, group, config, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"21825 tokens a rank.*at most 21824"):
        check_tokens(21825, group, config, torch.device("cpu"))
    os.environ["NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN"] = "2"
    check_tokens(21825, group, config, torch.device("cpu"))
    # 2 experts on each of 2 nodes
    os.environ["NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN"] = "1"
    with pytest.raises(ConfigError, match=r"--num-experts is 4.*use a multiple of 8"):
        layer_of(config, DynMoEConfig())
    for value, said in (("3", "divides the 2"), ("x", "is 'x'"), ("0", "is '0'")):
        os.environ["NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN"] = value
        with pytest.raises(ConfigError, match=said):
            layer_of(config, DynMoEConfig())


def check_memory_is_let_go() -> None:
    """What a pass has received is gone after its backward pass, without the garbage collector's help."""
    import gc
    import weakref

    from megatron_dynmoe.config import DynMoEConfig

    setup()
    for backend in BACKENDS:
        layer = filled(layer_of(layer_config(**EP2, **flex(backend), **SHARED), DynMoEConfig(top_p=0.5)))
        refs, experts = [], layer.experts.forward

        def watched(rows, counts, weights, refs=refs, experts=experts):
            refs.append(weakref.ref(rows))
            return experts(rows, counts, weights)

        layer.experts.forward = watched
        gc.disable()
        x, _ = inputs(layer)
        out, _ = layer(x)
        out.sum().backward()
        del out
        assert refs[0]() is None, backend
        gc.enable()


assert F % 8 == 0  # torch's grouped GEMM takes rows of a multiple of 16 bytes
