"""What a layer must do on any device, as functions that raise where it does not.

``test_gpu.py`` runs all of them, on a GPU and on the CPU; ``make gpu-check`` begins with those marked ``smoke``.
Each builds its own layer; Megatron has been started (:func:`benchmarks.gpu.layers.start_megatron`).
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import layers
from benchmarks.gpu.layers import B, D, E, S, build, inputs, layer_pass, torch_layer

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One check.

    Attributes:
        check: raises AssertionError.
        te: needs Transformer Engine, or what stands in for it.
        hopper: on a GPU, needs one for which torch's grouped GEMM has a kernel; before Hopper it is a loop that reads
            the groups' ends on the host.
        smoke: among the first that ``make gpu-check`` runs.
    """

    check: Callable[[], None]
    te: bool = False
    hopper: bool = False
    smoke: bool = False

    def why_not(self) -> str | None:
        """Why it cannot run here, as a sentence; ``None`` if it can."""
        if self.te and not layers.has_te():
            return "no Transformer Engine"
        if self.hopper and torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
            return "torch's grouped GEMM loops on the host before Hopper"
        return None


CASES: dict[str, Case] = {}


def case(name: str, *args: Any, **needs: bool) -> Callable[[Callable], Callable]:
    """Decorator: the function, called with ``args``, is the case ``name``."""

    def add(function: Callable) -> Callable:
        assert name not in CASES, name
        CASES[name] = Case(functools.partial(function, *args), **needs)
        return function

    return add


def reference_pass(layer: Any, x: Tensor, grad: Tensor, p: float, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Output, and gradients of input, router and experts, of reference.py in plain torch in ``dtype``.

    The router is float32 or wider, as everywhere; which experts are chosen is computed in float32 for all dtypes.
    """
    from megatron_dynmoe import reference

    leaves = [t.detach().to(dtype).requires_grad_() for t in (x.reshape(-1, D), layer.router.weight)]
    leaves += [t.detach().to(dtype).requires_grad_() for t in (layer.experts.weight1, layer.experts.weight2)]
    x_TD, router, fc1, fc2 = leaves
    chosen = reference.softmax_scores(x.reshape(-1, D).float(), layer.router.weight.float()).tolist()
    sets = [reference.top_p_set(row, p) if p < 1 else set(range(E)) for row in chosen]
    mask = torch.tensor([[e in s for e in range(E)] for s in sets], device=x.device)
    wide = torch.promote_types(dtype, torch.float32)
    scores = torch.softmax(x_TD.to(wide) @ router.to(wide).t(), dim=-1)
    out = reference.dense_moe(x_TD, torch.where(mask, scores, 0).to(dtype), fc1, fc2)
    out.backward(grad.reshape(-1, D).to(dtype))
    return [out.detach().view_as(x), leaves[0].grad.view_as(x), *(leaf.grad for leaf in leaves[1:])], mask


def error(got: Tensor, exact: Tensor) -> float:
    """The largest difference."""
    return (got.double() - exact).abs().max().item()


def allowed(simple: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """Twice what plain torch makes of the same weights in this dtype; and one rounding of the largest value, for where
    plain torch happens to be exact."""
    return 2 * error(simple, truth) + torch.finfo(dtype).eps * truth.abs().max().item()


@case("reference, float32, p 0", torch.float32, 0.0)
@case("reference, float32, p 0.4", torch.float32, 0.4)
@case("reference, float32, p 1", torch.float32, 1.0)
@case("reference, bfloat16, p 0", BF16, 0.0)
@case("reference, bfloat16, p 0.4", BF16, 0.4, smoke=True)
@case("reference, bfloat16, p 1", BF16, 1.0)
def equals_the_reference(dtype: torch.dtype, p: float) -> None:
    """Output and all gradients of torch experts against plain torch in float64."""
    layer = torch_layer(dtype, p)
    x, grad = inputs(dtype)
    exact, mask = reference_pass(layer, x, grad, p, torch.float64)
    plain, _ = reference_pass(layer, x, grad, p, dtype)
    assert torch.equal(layer.router(x).map_TE, mask)
    counts = mask.sum(dim=1)
    assert p != 0.4 or counts.min() < counts.max()  # ragged, or this tests little
    for name, ours, simple, truth in zip(layers.NAMES, layer_pass(layer, x, grad), plain, exact, strict=True):
        most = allowed(simple, truth, dtype)
        assert error(ours, truth) <= most, (name, error(ours, truth), most)


@case("torch experts without rows", layers.no_rows, False, smoke=True)
@case("torch experts, one has rows", layers.one_expert, False, smoke=True)
@case("torch experts, uneven map", layers.uneven, False, smoke=True)
@case("torch experts without rows, fused permute", layers.no_rows, True, te=True, smoke=True)
@case("torch experts, one has rows, fused permute", layers.one_expert, True, te=True, smoke=True)
@case("torch experts, uneven map, fused permute", layers.uneven, True, te=True, smoke=True)
def torch_experts(choose: Callable, fused: bool) -> None:
    """Output and gradients are 0 exactly where an expert has no row, also on memory that held something else."""
    layer = torch_layer(BF16, 0.4, moe_permute_fusion=fused)
    x, grad = inputs(BF16)
    layers.routed(layer, choose, x)
    chosen = layer.router(x).map_TE
    # What a kernel forgets to write is then seen: the allocator hands this memory out again.
    for weight in (layer.experts.weight1, layer.experts.weight2):
        torch.full_like(weight, float("nan"))
    out, x_grad, _, fc1_grad, fc2_grad = layer_pass(layer, x, grad)
    assert out.shape == x.shape and x_grad.shape == x.shape and not out.isnan().any()
    visited, idle = chosen.any(dim=1).view(S, B), ~chosen.any(dim=0)
    assert torch.equal(out.any(dim=-1), visited), "a token's output is 0 where it visits nobody, and nowhere else"
    # An expert without rows has a zero gradient, not none: the reduction across ranks waits for it.
    for grads in (fc1_grad, fc2_grad):
        assert torch.equal((grads == 0).flatten(1).all(dim=1), idle), "an idle expert's gradient is 0, exactly"


@case("TE experts without rows", layers.no_rows, te=True, smoke=True)
@case("TE experts, one has rows", layers.one_expert, te=True, smoke=True)
@case("TE experts, uneven map", layers.uneven, te=True, smoke=True)
def transformer_engine_experts(choose: Callable) -> None:
    """The same of Transformer Engine's experts behind its fused permutation."""
    from megatron_dynmoe.config import DynMoEConfig

    layer = build(DynMoEConfig(expert_backend="te"), te=True, dtype=BF16, moe_permute_fusion=True)
    x, grad = inputs(BF16)
    layers.routed(layer, choose, x)
    chosen = layer.router(x).map_TE
    out, _ = layer(x.requires_grad_())
    out.backward(grad)
    assert torch.equal(out.any(dim=-1), chosen.any(dim=1).view(S, B))
    for name, weight in layer.experts.named_parameters():
        idle = not chosen[:, int(name.rpartition("weight")[2])].any()
        assert weight.grad is not None and (weight.grad == 0).all() == idle, name


@case("fused permute equals plain", te=True, smoke=True)
def fused_equals_plain() -> None:
    """Both move the same rows; only the sums over a token's rows may be rounded differently."""
    x, grad = inputs(BF16)
    plain, fused = (layer_pass(torch_layer(BF16, 0.4, moe_permute_fusion=f), x, grad) for f in (False, True))
    exact, _ = reference_pass(torch_layer(BF16, 0.4), x, grad, 0.4, torch.float64)
    for name, a, b, truth in zip(layers.NAMES, plain, fused, exact, strict=True):
        assert error(b, truth) <= allowed(a, truth, BF16), name


@case("checkpoint from torch to TE experts", "torch", te=True)
@case("checkpoint from TE to torch experts", "te", te=True)
def checkpoint_moves(saver: str) -> None:
    """What one backend saved the other loads, and computes the same."""
    from megatron.core import dist_checkpointing, parallel_state

    from megatron_dynmoe.config import DynMoEConfig

    ours = torch_layer(BF16, 0.4)
    te = build(DynMoEConfig(top_p=0.4, expert_backend="te"), te=True, dtype=BF16)
    assert type(te.experts).__name__ == "TEGroupedMLP"
    first, second = (ours, te) if saver == "torch" else (te, ours)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    with tempfile.TemporaryDirectory() as folder:
        dist_checkpointing.save(first.sharded_state_dict(prefix="mlp.", metadata=metadata), folder)
        state = dist_checkpointing.load(second.sharded_state_dict(prefix="mlp.", metadata=metadata), folder)
    second.load_state_dict({key.removeprefix("mlp."): value for key, value in state.items()})

    x, grad = inputs(BF16)
    exact, _ = reference_pass(ours, x, grad, 0.4, torch.float64)  # both hold the same weights now
    plain, _ = reference_pass(ours, x, grad, 0.4, BF16)
    for layer in (ours, te):
        got = error(layer(x)[0].detach(), exact[0])
        assert got <= allowed(plain[0], exact[0], BF16), (type(layer.experts).__name__, got)


def synchronisations(work: Callable[[], object]) -> list[str]:
    """How ``work()`` makes the host wait for the device, as torch's own sync debug mode sees it; on the CPU nothing."""
    if not torch.cuda.is_available():
        work()
        return []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [str(warning.message) for warning in caught if "synchronizing CUDA operation" in str(warning.message)]


def expect(waits: list[str], count: int) -> None:
    """The host waited ``count`` times, where that can be told."""
    assert len(waits) == (count if torch.cuda.is_available() else 0), waits


@case("one synchronisation in a forward pass", hopper=True)
def synchronises_once() -> None:
    """The copy of the plan's counts, and nothing in backward."""
    layer = torch_layer(BF16, 0.4)
    x, grad = inputs(BF16)
    layer_pass(layer, x, grad)  # kernels are loaded and memory is taken once
    outputs: list[Tensor] = []
    expect(synchronisations(lambda: outputs.append(layer(x.detach().requires_grad_())[0])), 1)
    expect(synchronisations(lambda: outputs[0].backward(grad)), 0)


@case("one synchronisation in a plan, none in its moves", "expert")
@case("one synchronisation in a plan, none in its moves, rows by rank", "rank")
def plan_synchronises_once(unit: str) -> None:
    """A plan is built with one copy to the host; moves along it need none."""
    from megatron_dynmoe import dispatch
    from megatron_dynmoe.routing import RoutePlan

    torch.manual_seed(layers.SEED)
    where = layers.device()
    chosen = torch.rand(512, E, device=where) < 0.3
    weights = torch.rand(512, E, device=where, requires_grad=True)
    x = torch.randn(512, D, device=where, requires_grad=True)
    outputs: list[Tensor] = []

    def move(plan: RoutePlan) -> None:
        rows, row_weights, transport = dispatch.dispatch(x, weights, plan, unit=unit)
        outputs.append(dispatch.combine(rows * row_weights.unsqueeze(-1), transport, 512))
        outputs[-1].sum().backward()

    move(RoutePlan.build(chosen))
    plans: list[RoutePlan] = []
    expect(synchronisations(lambda: plans.append(RoutePlan.build(chosen))), 1)
    expect(synchronisations(lambda: move(plans[0])), 0)
    assert plans[0].rows_sent == chosen.sum().item()
    # sum of float32 products, in any order: E roundings of the largest partial sum
    exact = x.detach().double() * torch.where(chosen, weights.detach(), 0).double().sum(dim=1, keepdim=True)
    assert error(outputs[-1].detach(), exact) <= E * torch.finfo(torch.float32).eps * exact.abs().max().item()
