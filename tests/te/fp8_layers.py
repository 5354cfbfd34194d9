"""Bodies of test_fp8.py, for a rank: dynamic layers with experts in FP8 beside the same ones in bfloat16."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.layers import answers
from tests.te.layers import B, D, E, F, S, build_dynamic, load, save

RECIPES = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3"}
SHARED = {"moe_shared_expert_intermediate_size": F}
# What a layer is beside its preset: settings of megatron's configuration, and of ours.
LAYERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "shared, rows per expert, fused": (SHARED | {"moe_permute_fusion": True}, {"dispatch_unit": "expert"}),
    "shared, overlapped, rows per rank": (SHARED | {"moe_shared_expert_overlap": True}, {"dispatch_unit": "rank"}),
    "residual mixer": (SHARED, {"residual": True}),
    "rows padded by Transformer Engine": ({"moe_router_padding_for_quantization": False}, {}),
    # by itself a history has the largest of all data-parallel ranks, of other experts in the same place too
    "own scales, k at its cap": ({"tp_only_amax_red": True}, {"max_experts_per_token": 1}),
}
# Numbers of e5m2 have two bits, of e4m3 three: each is off by up to 2^-3 and 2^-4 of itself, at random, in sums of 48
# to 128. Sums of squares over a whole tensor, so that one number does not decide.
TOLERANCE = 2**-3
# ... and of differences between such numbers, which is what routers and the mixer learn from.
OF_DIFFERENCES = 2**-2


def start(expert_ranks: int = 2) -> int:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=expert_ranks)
    model_parallel_cuda_manual_seed(1)
    return torch.distributed.get_rank()


def fp8_settings(recipe: str | None) -> dict[str, Any]:
    if recipe is None:
        return {}
    return {
        "fp8": RECIPES[recipe],
        "fp8_recipe": recipe,
        "fp8_amax_history_len": 4,
        "fp8_amax_compute_algo": "max",
        "moe_router_padding_for_quantization": True,
    }


def build(preset: str, recipe: str | None, extra: str = "plain", *, expert_ranks: int = 2):
    """The layer on two ranks; the same weights whatever the recipe."""
    from megatron_dynmoe.config import PRESETS

    theirs, ours = LAYERS[extra]
    if recipe is None:
        theirs = {name: value for name, value in theirs.items() if name != "moe_router_padding_for_quantization"}
    settings = fp8_settings(recipe) | {"expert_model_parallel_size": expert_ranks} | theirs
    dynmoe = PRESETS[preset] | {"expert_backend": "te"} | ours
    layer = build_dynamic(torch.bfloat16, dynmoe, **settings)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            seed = torch.Generator().manual_seed(sum(map(ord, name)))
            if "thresholds" not in name and parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=seed) * parameter.shape[-1] ** -0.5)
    return layer


@contextmanager
def seen(layer):
    """What the experts get and what is quantised, by quantiser."""
    import transformer_engine_torch as tex

    module = sys.modules["transformer_engine_torch.quantize"]  # the package's name of it is the function's

    record: dict[str, Any] = {"rows": [], "quantizers": set(), "free": []}
    quantize = module.quantize

    def spy(tensor, quantizer, *args, **kwargs):
        if quantizer is not None:
            record["quantizers"].add(id(quantizer))
        return quantize(tensor, quantizer, *args, **kwargs)

    def experts(inner, args):
        record["rows"].append((args[0].detach().clone(), args[1].tolist(), args[2].detach().clone()))

    hooks = [layer.experts.register_forward_pre_hook(experts)]
    if layer.free_experts is not None:
        hooks.append(layer.free_experts.register_forward_hook(lambda m, args, out: record["free"].append(out.clone())))
    module.quantize = tex.quantize = spy
    try:
        yield record
    finally:
        module.quantize = tex.quantize = quantize
        for hook in hooks:
            hook.remove()


def one_pass(layer, x, grad) -> dict[str, Any]:
    """Output, gradients, what the router decided and what the experts got."""
    from megatron.core.fp8_utils import get_fp8_context

    x = x.clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    routed: list[Any] = []
    hook = layer.router.register_forward_hook(lambda m, args, out: routed.append(out))
    with seen(layer) as record:
        with get_fp8_context(layer.config):
            out, _ = layer(x)
        out.backward(grad)
    hook.remove()
    weights, chosen = routed[0].weights_TE, routed[0].map_TE
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return {"output": out.detach(), "input": x.grad, "weights": weights, "map": chosen, "gradients": gradients} | record


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()


def check_layers(presets: list[str]) -> None:
    rank = start()
    torch.manual_seed(10 + rank)
    x, grad = torch.randn(S, B, D).bfloat16(), torch.randn(S, B, D).bfloat16()
    for preset in presets:
        for extra in LAYERS:
            if extra == "residual mixer" and preset not in ("gshard", "moe-plus-plus"):
                continue
            wanted = one_pass(build(preset, None, extra), x, grad)
            for recipe in RECIPES:
                layer = build(preset, recipe, extra)
                for _ in range(2 if recipe == "delayed" else 1):  # the first pass of a history has no scale
                    got = one_pass(layer, x, grad)
                errors = compare(layer, got, wanted, (preset, extra, recipe))
                if rank == 0:
                    print(preset, extra, recipe, {k: round(v, 3) for k, v in errors.items()}, flush=True)


def compare(layer, got: dict[str, Any], wanted: dict[str, Any], case: object) -> dict[str, float]:
    """Routing bit for bit as in bfloat16, what is computed in FP8 close to it, and nothing else cast."""
    assert torch.equal(got["map"], wanted["map"]), case
    assert torch.equal(got["weights"], wanted["weights"]) and got["weights"].dtype == torch.float32, case
    for ours, theirs in zip(got["free"], wanted["free"], strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == torch.bfloat16, case
    check_rows(layer, got["rows"][-1], wanted["rows"][-1], case)
    check_quantizers(layer, got["quantizers"], case)
    errors = {name: off(got[name], wanted[name]) for name in ("output", "input")}
    for name, gradient in wanted["gradients"].items():
        assert gradient is not None and got["gradients"][name].dtype == gradient.dtype, (case, name)
        errors[name] = off(got["gradients"][name], gradient)
    for name, error in errors.items():
        limit = OF_DIFFERENCES if name.startswith(("router.", "mixer.")) else TOLERANCE
        assert error <= limit, (case, name, error)
    assert errors["output"] > 0, case  # or nothing was cast
    return errors


def check_rows(layer, got: tuple, wanted: tuple, case: object) -> None:
    """The same rows and weights, followed by zeros up to a multiple of 16 where the configuration says so."""
    multiple = 16 if layer.config.moe_router_padding_for_quantization else 1
    sizes = [-(-size // multiple) * multiple for size in wanted[1]]
    assert got[1] == sizes, (case, got[1], wanted[1])
    for ours, theirs in ((got[0], wanted[0]), (got[2], wanted[2])):
        parts = zip(ours.split(sizes), theirs.split(wanted[1]), strict=True)
        assert all(torch.equal(a[: len(b)], b) and not a[len(b) :].any() for a, b in parts), case


def check_quantizers(layer, quantizers: set[int], case: object) -> None:
    """Each cast is one of the experts' or of the shared expert's linear layers, and both of theirs are cast."""
    owners = {}
    for name, module in layer.named_modules():
        for parts in getattr(module, "quantizers", {}).values():
            owners |= {id(quantizer): name for quantizer in parts}
    modules = {"experts", "shared_experts"} if layer.use_shared_expert else {"experts"}
    expected = {f"{module}.linear_fc{i}" for module in modules for i in (1, 2)}
    assert {owners.get(one, "another") for one in quantizers} == expected, case


def check_scales_move_with_their_experts(folder: Path) -> None:
    """Written by two expert-parallel ranks, read by one, and back: each expert has its own history and scale again."""
    os.environ["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] = "1"  # as resume.prepare() sets it
    rank = start()
    layer = build("dynamic-moe", "delayed", "own scales, k at its cap")
    for step in range(3):
        torch.manual_seed(10 + 2 * step + rank)
        one_pass(layer, torch.randn(S, B, D).bfloat16() * 2**step, torch.randn(S, B, D).bfloat16())
    wanted = scales(layer)
    for what, value in wanted.items():
        assert len(value.transpose(0, 1).flatten(1).unique(dim=0)) == E, what  # or nothing would show a mix-up
    for number, expert_ranks in enumerate((1, 2)):
        save(layer, folder / str(number))
        start(expert_ranks)
        layer = build("dynamic-moe", "delayed", "own scales, k at its cap", expert_ranks=expert_ranks)
        load(layer, folder / str(number))
        for what, value in scales(layer).items():
            assert torch.equal(value, wanted[what]), (expert_ranks, what)


def scales(layer) -> dict[tuple[str, str], torch.Tensor]:
    """By linear layer and direction: [history and scale, experts of all ranks, roles]."""
    from megatron.core import parallel_state

    group, found = parallel_state.get_expert_model_parallel_group(), {}
    for name in ("linear_fc1", "linear_fc2"):
        linear = getattr(layer.experts, name)
        for direction, roles in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            meta = linear.fp8_meta[direction]
            mine = torch.cat([meta.amax_history, meta.scale[None]]).view(-1, linear.num_gemms, roles)
            parts = [torch.empty_like(mine) for _ in range(group.size())]
            torch.distributed.all_gather(parts, mine, group=group)
            found[name, direction] = torch.cat(parts, dim=1)
    return found


def check_layers_in_fp8(argv: list[str], wanted: list[int]) -> int:
    """A run after which the layers of these numbers, and no other, have computed in FP8: experts and attention."""
    import gc

    from megatron.core.transformer.transformer_layer import TransformerLayer

    from tests import ranks

    code = ranks.pretrain(argv)
    layers = [one for one in gc.get_objects() if isinstance(one, TransformerLayer)]
    assert layers
    for layer in layers:
        linear = {name: module for name, module in layer.named_modules() if hasattr(module, "fp8_meta")}
        assert any("mlp.experts.linear_fc1" in name for name in linear) and len(linear) > 4, list(linear)
        for name, module in linear.items():
            assert module.fp8 == (layer.layer_number in wanted), (layer.layer_number, name)
    return code


def check_mxfp8() -> None:
    """Refused before Blackwell; there rows come in multiples of 32. Its casts are not stood in for."""
    from argparse import Namespace
    from unittest import mock

    from megatron_dynmoe.config import ConfigError
    from megatron_dynmoe.training.values import check_recipe

    start()
    args = Namespace(fp8="e4m3", fp8_recipe="mxfp8")
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        try:
            check_recipe(args)
        except ConfigError as error:
            assert "this GPU's capability is 9.0, and mxfp8 is for 10.0" in str(error)
        else:
            raise AssertionError("accepted on Hopper")
        with mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (10, 0)):
            check_recipe(args)
    layer = build("dynamic-moe", None)
    layer.config.fp8, layer.config.fp8_recipe = "e4m3", "mxfp8"
    layer.config.moe_router_padding_for_quantization = True
    sizes: list[int] = []

    class Stop(Exception):
        pass

    def look(module, args):
        sizes.extend(args[1].tolist())
        raise Stop

    layer.experts.register_forward_pre_hook(look)
    try:
        layer(torch.randn(S, B, D).bfloat16())
    except Stop:
        assert sizes and any(sizes) and not any(size % 32 for size in sizes)


def check_idle_experts() -> None:
    """No rows for one expert, for all of a rank's, or for any: zeros, and a zero gradient for each idle weight."""
    rank = start()
    x, grad = torch.randn(S, B, D).bfloat16(), torch.randn(S, B, D).bfloat16()
    for recipe in RECIPES:
        for used in (range(1, E), range(E // 2), ()):
            layer = build("dynamic-moe", recipe)
            chosen = torch.zeros(S * B, E, dtype=torch.bool)
            chosen[:, list(used)] = True
            weights = (chosen * 0.25).requires_grad_()
            answers(layer, weights, chosen)
            got = one_pass_of_map(layer, x, grad)
            assert bool((got == 0).all()) == (not used) and bool(got.isfinite().all()), (recipe, used)
            for name, weight in layer.experts.named_parameters():
                idle = rank * E // 2 + int(name.rpartition("weight")[2]) not in used
                assert weight.grad is not None and bool((weight.grad == 0).all()) == idle, (recipe, used, name)


def one_pass_of_map(layer, x, grad) -> torch.Tensor:
    from megatron.core.fp8_utils import get_fp8_context

    with get_fp8_context(layer.config):
        out, _ = layer(x.clone().requires_grad_())
    out.backward(grad)
    return out.detach()
