"""Times: whole layers, the activation's share, and the two units of a row on the wire without the wire."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import layer_quick
from benchmarks.gpu import layers as one_layer
from benchmarks.gpu.memory import forced_exchanges
from benchmarks.gpu.process import write_json
from benchmarks.gpu.step import Context


def layers(context: Context) -> None:
    """layer_quick's table; a trace of one layer for chrome://tracing; gated activation alone, over the whole layer."""
    layer_quick.start_megatron()
    shape = layer_quick.SHAPES[context.device]
    dtype = torch.float32 if context.cpu else torch.bfloat16
    rows = layer_quick.measure(shape, dtype, 2 if context.cpu else 20)
    write_json(context.out / "layer_quick.json", rows)
    context.note(rows=rows, table=layer_quick.table(rows).splitlines())
    x = torch.randn(shape.tokens, 1, shape.width, device=context.device).to(dtype)
    name, build = list(layer_quick.builders(shape, dtype, 0.4))[-2]  # top-k: as many rows as tokens times k
    layer = build().to(context.device)
    trace(layer, x, context)
    alone = activation_seconds(shape, dtype, shape.tokens * shape.topk, context.device)
    whole = seconds(lambda: layer_quick.time_one(layer, x))
    context.note(traced=name, activation_milliseconds=alone * 1e3, activation_share=alone / whole)
    best = {row["layer"]: f"{row['milliseconds']:.2f} ms" for row in rows}
    context.note(says=f"{name} {best[name]}, its activation {alone / whole:.0%} of it")


def trace(layer: Any, x: torch.Tensor, context: Context) -> None:
    """A profiler's trace of one pass, and the operations that take most, in files."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if not context.cpu:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    layer_quick.time_one(layer, x)
    with torch.profiler.profile(activities=kinds) as profile:
        layer_quick.time_one(layer, x)
    profile.export_chrome_trace(str(context.out / "layer.trace.json"))
    by = "self_cpu_time_total" if context.cpu else "self_device_time_total"
    (context.out / "layer.operations.txt").write_text(profile.key_averages().table(sort_by=by, row_limit=40))


def seconds(once: Callable[[], float], repeats: int = 7) -> float:
    """The median of some, after two that warm up."""
    return statistics.median([once() for _ in range(repeats + 2)][2:])


def activation_seconds(shape: Any, dtype: torch.dtype, rows: int, device: str) -> float:
    """Forward and backward of the activation between the GEMMs of torch experts, on ``rows`` rows."""
    from megatron_dynmoe.experts.activation import gated_activation

    hidden = torch.randn(rows, 2 * shape.expert_width, device=device).to(dtype).requires_grad_()
    weights = torch.rand(rows, device=device, requires_grad=True)
    grad = torch.randn(rows, shape.expert_width, device=device).to(dtype)

    def once() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        gated_activation(hidden, weights, torch.nn.functional.silu).backward(grad)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    return seconds(once)


def units(context: Context) -> None:
    """The layer with rows by expert and by rank, exchanges forced on one rank.

    All that a row costs beside the network: packing, weights, copies and sums on arrival, and for rows by rank the loss
    of Transformer Engine's fused permutation. What a byte costs between GPUs one GPU cannot tell.
    """
    from megatron_dynmoe.config import DynMoEConfig

    one_layer.start_megatron()
    shape = layer_quick.SHAPES[context.device]
    dtype = torch.float32 if context.cpu else torch.bfloat16
    x = torch.randn(shape.tokens, 1, shape.width, device=context.device).to(dtype)
    found: dict[str, float] = {}
    for te in [False, True] if one_layer.has_te() else [False]:
        for k in (2, 4):
            for unit in ("expert", "rank"):
                dynmoe = DynMoEConfig(rule="top-k", topk=k, expert_backend="te" if te else "torch", dispatch_unit=unit)
                sizes = {"width": shape.width, "inner": shape.expert_width, "experts": shape.experts}
                layer = one_layer.build(dynmoe, te=te, dtype=dtype, moe_permute_fusion=te, **sizes)
                with forced_exchanges():
                    name = f"{'TE' if te else 'torch'}, k {k}, rows by {unit}"
                    found[name] = seconds(lambda layer=layer: layer_quick.time_one(layer, x)) * 1e3
                context.note(milliseconds=found)
    # Rows by rank pay where the bytes they save take longer than this difference.
    dearer = {
        name.removesuffix(", rows by rank"): found[name] - found[name.replace("by rank", "by expert")]
        for name in found
        if name.endswith("by rank")
    }
    context.note(
        rank_minus_expert_milliseconds=dearer,
        table=[f"{name}: {value:.3f} ms" for name, value in found.items()],
        says="rows by rank cost " + ", ".join(f"{value:+.2f} ms ({name})" for name, value in dearer.items()),
    )
