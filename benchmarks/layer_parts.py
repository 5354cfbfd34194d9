"""What the time of one layer is made of: grouped GEMMs, experts, activation, moves, MoE++'s zero-computation experts.

    python benchmarks/layer_parts.py --threads 2

"experts" is what the layer does: products and activation, chunk by chunk.  Activation and zero-computation experts (two
constant, a copy and a zero expert) are also run alone, in blocks and as operations over whole tensors.  Each part runs
alone, forward and backward, in turn with the others; medians, and ratios to the GEMMs.  On one rank, in float32, with
the allocator as it comes (``bench_moe_layer.py`` tells it to keep freed memory, which shrinks all parts).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_dynmoe.dispatch import combine, dispatch
from megatron_dynmoe.experts import grouped_mlp, zero_computation
from megatron_dynmoe.experts.activation import gated_activation
from megatron_dynmoe.routing import RoutePlan

Steps = dict[str, Callable[[], None]]


def leaf(*shape: int) -> torch.Tensor:
    """A tensor that gets a gradient."""
    return torch.randn(*shape, requires_grad=True)


def cleared(steps: Steps, leaves: tuple[torch.Tensor, ...]) -> Steps:
    """The same steps, each without the gradients of the one before."""

    def clearing(run: Callable[[], None]) -> Callable[[], None]:
        def step() -> None:
            for tensor in leaves:
                tensor.grad = None
            run()

        return step

    return {name: clearing(run) for name, run in steps.items()}


def free_parts(tokens: int, width: int) -> Steps:
    """The zero-computation experts, forward and backward once; half of the weights are not 0."""
    x_TD, select_C2D, values_CD, grad_TD = leaf(tokens, width), leaf(2, 2, width), leaf(2, width), leaf(tokens, width)
    weights_TZ = (torch.rand(tokens, 4) * (torch.rand(tokens, 4) < 0.5)).requires_grad_()

    def in_blocks() -> None:
        zero_computation(x_TD, weights_TZ, select_C2D, values_CD, copies=1).backward(grad_TD)

    def whole() -> None:
        first_TC = F.linear(x_TD, select_C2D[:, 0] - select_C2D[:, 1]).sigmoid()
        share_T1 = weights_TZ[:, 2:3] + (weights_TZ[:, :2] * first_TC).sum(dim=-1, keepdim=True)
        (share_T1 * x_TD + (weights_TZ[:, :2] * (1 - first_TC)) @ values_CD).backward(grad_TD)

    steps = {"free experts, in blocks": in_blocks, "free experts, whole tensors": whole}
    return cleared(steps, (x_TD, select_C2D, values_CD, weights_TZ))


def ffn_parts(tokens: int, width: int, inner: int, experts: int, k: int) -> Steps:
    """Each part of a layer of FFN experts as a function that runs it forward and backward once."""
    rows = tokens * k
    map_TE = torch.zeros(tokens, experts, dtype=torch.bool)
    map_TE.scatter_(1, torch.rand(tokens, experts).topk(k).indices, True)
    ends = map_TE.sum(0).cumsum(0).int()

    x, weights = leaf(tokens, width), torch.where(map_TE, torch.rand(tokens, experts), 0.0).requires_grad_()
    fc1, fc2, first, second = (
        leaf(experts, 2 * inner, width),
        leaf(experts, width, inner),
        leaf(rows, width),
        leaf(rows, inner),
    )
    hidden, row_weights = leaf(rows, 2 * inner), torch.rand(rows, requires_grad=True)
    grads = {n: torch.randn(rows, n) for n in {2 * inner, inner, width}}
    grad_TD = torch.randn(tokens, width)

    def gemms() -> None:
        F.grouped_mm(first, fc1.transpose(1, 2), offs=ends).backward(grads[2 * inner])
        F.grouped_mm(second, fc2.transpose(1, 2), offs=ends).backward(grads[width])

    def ours() -> None:
        grouped_mlp(first, row_weights, fc1, fc2, map_TE.sum(0)).backward(grads[width])

    def in_blocks() -> None:
        gated_activation(hidden, row_weights).backward(grads[inner])

    def whole() -> None:
        gate, up = hidden.chunk(2, dim=-1)
        (F.silu(gate) * up * row_weights.unsqueeze(-1)).backward(grads[inner])

    def moves() -> None:
        out, _, transport = dispatch(x, weights, RoutePlan.build(map_TE))
        combine(out, transport, tokens).backward(grad_TD)

    leaves = (x, weights, fc1, fc2, first, second, hidden, row_weights)

    steps = {
        "GEMMs": gemms,
        "experts": ours,
        "activation, in blocks": in_blocks,
        "activation, whole tensors": whole,
        "moves": moves,
    }
    return cleared(steps, leaves)


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("tokens", 4096), ("width", 512), ("inner", 1408), ("experts", 16), ("k", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    steps = ffn_parts(options.tokens, options.width, options.inner, options.experts, options.k)
    steps |= free_parts(options.tokens, options.width)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.repeats + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    print("| part | ms | / GEMMs |\n|---|---|---|")
    for name, seconds in medians.items():
        print(f"| {name} | {seconds * 1e3:.1f} | {seconds / medians['GEMMs']:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
