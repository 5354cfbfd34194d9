"""Forward and backward time of one MoE layer: ours with top-p against megatron-core's top-k at the same mean k.

    python benchmarks/layer_quick.py                      # a table; CUDA where it is, else the CPU
    python benchmarks/layer_quick.py --json rows.json     # and the rows as JSON

All layers live in one process, see the same input and are timed in turn, round after round, so that whatever drifts
(clocks, neighbours) touches all of them alike; the median over the rounds is reported. The threshold p is searched so
that tokens visit k experts on average, so every layer computes the same number of rows up to that search's precision.
One rank: nothing is sent.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Shape:
    """T tokens of width D, E experts of width F, k of them a token."""

    tokens: int
    width: int
    expert_width: int
    experts: int
    topk: int

    def flops(self, rows: int) -> int:
        """Forward and backward: three products of a SwiGLU expert, each once forward and twice backward."""
        return 3 * 2 * 3 * rows * self.width * self.expert_width


SHAPES = {
    "cuda": Shape(tokens=16384, width=1024, expert_width=2816, experts=16, topk=2),
    "cpu": Shape(tokens=512, width=128, expert_width=256, experts=8, topk=2),
}


def main(argv: list[str] | None = None) -> int:
    """Time the layers, print a table, write JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, help="tokens of a pass (default: 16384 on CUDA, 512 on the CPU)")
    parser.add_argument("--repeats", type=int, default=20, help="rounds that are timed (default: 20)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--cpu", action="store_true", help="the CPU also where CUDA is")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(argv)
    if options.repeats < 1 or (options.tokens is not None and options.tokens < 1):
        parser.error("--repeats and --tokens are at least 1.")
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    start_megatron()

    import torch

    cuda = torch.cuda.is_available()
    shape = SHAPES["cuda" if cuda else "cpu"]
    if options.tokens:
        shape = Shape(**{**vars(shape), "tokens": options.tokens})
    dtype = getattr(torch, options.dtype or ("bfloat16" if cuda else "float32"))
    rows = measure(shape, dtype, options.repeats)
    print(table(rows))
    if options.json:
        write_json(options.json, rows)
    return 0


def start_megatron() -> None:
    """One rank, without ports or environment variables; once, if it is called again."""
    sys.path.insert(0, str(ROOT))
    from megatron_dynmoe import host

    host.enable()

    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if torch.distributed.is_initialized():
        return
    torch.distributed.init_process_group(host.backend(), store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)


def measure(shape: Shape, dtype: Any, repeats: int) -> list[dict[str, Any]]:
    """Time every layer that this machine can build.

    Returns:
        one row a layer: name, its experts' class, times in milliseconds, what it computed.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(shape.tokens, 1, shape.width, device=device).to(dtype)
    weight = torch.randn(shape.experts, shape.width, device=device) / shape.width**0.5
    p = threshold_for(shape, x, weight)
    layers = {name: build().to(device) for name, build in builders(shape, dtype, p)}
    for layer in layers.values():
        layer.router.weight.data.copy_(weight)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for turn in range(repeats + 3):  # three to warm up
        for name, layer in layers.items():
            elapsed = time_one(layer, x)
            if turn >= 3:
                seconds[name].append(elapsed)
        progress(turn + 1, repeats + 3)
    return [row(name, layers[name], x, shape, times, dtype) for name, times in seconds.items()]


def threshold_for(shape: Shape, x: Any, weight: Any) -> float:
    """The p at which tokens visit ``topk`` experts on average, by bisection; the mean grows with p."""
    from megatron_dynmoe.config import DynMoEConfig
    from megatron_dynmoe.routers import route

    low, high = 0.0, 1.0
    for _ in range(20):
        p = (low + high) / 2
        map_TE = route(x.reshape(-1, shape.width), weight, DynMoEConfig(top_p=p)).map_TE
        mean = map_TE.sum().item() / shape.tokens
        low, high = (p, high) if mean < shape.topk else (low, p)
    return p


def builders(shape: Shape, dtype: Any, p: float) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names of layers and how to build each; those of Transformer Engine where it is and there is a GPU."""
    from megatron_dynmoe.config import DynMoEConfig
    from megatron_dynmoe.mcore.specs import dynamic_layer_spec

    config = layer_config(shape, dtype)

    def stock(te: bool) -> Any:
        return layer_spec(shape, te).submodules.mlp(config=config, layer_number=1)

    def ours(te: bool, **fields: Any) -> Any:
        dynmoe = DynMoEConfig(expert_backend="te" if te else "torch", **fields)
        return dynamic_layer_spec(layer_spec(shape, te), dynmoe).submodules.mlp(config=config, layer_number=1)

    for te in [False, True] if has_te() else [False]:
        suffix = "TE experts" if te else "sequential experts"
        yield f"megatron-core top-k, {suffix}", lambda te=te: stock(te)
        suffix = "TE experts" if te else "torch experts"
        yield f"dynamic top-k, {suffix}", lambda te=te: ours(te, rule="top-k", topk=shape.topk)
        yield f"dynamic top-p, {suffix}", lambda te=te: ours(te, rule="top-p", top_p=p)


def has_te() -> bool:
    """Whether Transformer Engine's grouped experts can run here."""
    import torch
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE and torch.cuda.is_available()


def layer_config(shape: Shape, dtype: Any) -> Any:
    """megatron-core's configuration of one SwiGLU layer without losses."""
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=shape.width,
        num_attention_heads=1,
        num_moe_experts=shape.experts,
        ffn_hidden_size=shape.expert_width,
        moe_ffn_hidden_size=shape.expert_width,
        moe_router_topk=shape.topk,
        moe_router_pre_softmax=True,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=has_te(),
        moe_permute_fusion=has_te(),
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=torch.cuda.is_available(),
        add_bias_linear=False,
        normalization="RMSNorm",
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )


def layer_spec(shape: Shape, te: bool) -> Any:
    """megatron-core's layer spec, of which the MoE layer is taken."""
    from megatron.core.models.gpt import gpt_layer_specs as specs

    if te:
        return specs.get_gpt_layer_with_transformer_engine_spec(num_experts=shape.experts, moe_grouped_gemm=True)
    return specs.get_gpt_layer_local_spec(num_experts=shape.experts, normalization="RMSNorm")


def time_one(layer: Any, x: Any) -> float:
    """Seconds of one forward and backward pass, until the device is done."""
    import torch

    inputs = x.detach().requires_grad_()
    layer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    out, _ = layer(inputs)
    out.backward(out.detach())  # any gradient of the right size
    torch.cuda.synchronize()
    return time.perf_counter() - start


def row(name: str, layer: Any, x: Any, shape: Shape, seconds: list[float], dtype: Any) -> dict[str, Any]:
    """What is reported of one layer."""
    import torch

    with torch.no_grad():
        routing = layer.router(x)
        map_TE = routing[1] if isinstance(routing, tuple) else routing.map_TE  # megatron-core's router, or ours
        rows = int(map_TE.sum())
    median = statistics.median(seconds)
    return {
        "layer": name,
        "experts_class": type(layer.experts).__name__,
        "milliseconds": median * 1e3,
        "milliseconds_min": min(seconds) * 1e3,
        "milliseconds_max": max(seconds) * 1e3,
        "repeats": len(seconds),
        "experts_per_token": rows / shape.tokens,
        "tflops": shape.flops(rows) / median / 1e12,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        **vars(shape),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for people."""
    first = rows[0]
    head = (
        f"{first['tokens']} tokens of width {first['width']}, {first['experts']} experts of width "
        f"{first['expert_width']}, {first['dtype']}, {first['device']}; "
        f"forward and backward, median of {first['repeats']}"
    )
    width = max(len(r["layer"]) for r in rows)
    lines = [f"{'layer'.ljust(width)}  {'ms':>9}  {'k':>6}  {'TFLOP/s':>8}"]
    for r in rows:
        numbers = f"{r['milliseconds']:9.3f}  {r['experts_per_token']:6.3f}  {r['tflops']:8.3f}"
        lines.append(f"{r['layer'].ljust(width)}  {numbers}")
    return "\n".join([head, *lines])


def progress(done: int, total: int) -> None:
    """A counter on a terminal; nothing in a log."""
    if sys.stderr.isatty():
        print(f"\rround {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write beside, then replace: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


if __name__ == "__main__":
    sys.exit(main())
