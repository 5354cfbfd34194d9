"""What the time of one layer above its GEMMs is made of: the activation, in blocks and as whole tensors, and the moves.

    python benchmarks/layer_parts.py --threads 2

Each part runs alone, forward and backward, in turn with the others; medians, and ratios to the GEMMs.  On one rank, in
float32, with the allocator as it comes (``bench_moe_layer.py`` tells it to keep freed memory, which shrinks all parts).
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
from megatron_dynmoe.experts.activation import gated_activation
from megatron_dynmoe.routing import RoutePlan


def parts(tokens: int, width: int, inner: int, experts: int, k: int) -> dict[str, Callable[[], None]]:
    """Each part as a function that runs it forward and backward once."""
    torch.manual_seed(0)
    rows = tokens * k
    map_TE = torch.zeros(tokens, experts, dtype=torch.bool)
    map_TE.scatter_(1, torch.rand(tokens, experts).topk(k).indices, True)
    ends = map_TE.sum(0).cumsum(0).int()

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, requires_grad=True)

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

    def in_blocks() -> None:
        gated_activation(hidden, row_weights).backward(grads[inner])

    def whole() -> None:
        gate, up = hidden.chunk(2, dim=-1)
        (F.silu(gate) * up * row_weights.unsqueeze(-1)).backward(grads[inner])

    def moves() -> None:
        out, _, transport = dispatch(x, weights, RoutePlan.build(map_TE))
        combine(out, transport, tokens).backward(grad_TD)

    leaves = (x, weights, fc1, fc2, first, second, hidden, row_weights)

    def cleared(run: Callable[[], None]) -> Callable[[], None]:
        def step() -> None:
            for tensor in leaves:
                tensor.grad = None
            run()

        return step

    named = {"GEMMs": gemms, "activation, in blocks": in_blocks, "activation, whole tensors": whole, "moves": moves}
    return {name: cleared(run) for name, run in named.items()}


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("tokens", 4096), ("width", 512), ("inner", 1408), ("experts", 16), ("k", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = parts(options.tokens, options.width, options.inner, options.experts, options.k)
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
