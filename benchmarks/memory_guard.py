"""Does the memory guard keep its promise? Peak memory of one layer with and without it, on the same tokens.

    python benchmarks/memory_guard.py                       # prints a table
    python benchmarks/memory_guard.py --json FILE

Early in top-p training the router is nearly flat, and a token visits several times the experts that it will visit in
the end.  Here the router is that flat: random weights of a small scale.  The same hidden states go through the layer
(route, dispatch, experts, combine, and all of it backwards) without a bound and with bounds of a few rows a token.
Memory is the peak of what torch's allocator handed out during the pass, gradients and temporaries included, inputs
and weights not; on the CPU from the profiler's record of allocations, on CUDA from the allocator.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import peak_of
from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.dispatch import combine, dispatch
from megatron_dynmoe.experts import grouped_mlp
from megatron_dynmoe.routers import route
from megatron_dynmoe.routing import RoutePlan


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns 1 if a bound did not hold the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--expert-width", type=int, default=1408)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-p", type=float, default=0.4)
    parser.add_argument("--bounds", type=float, nargs="*", default=[4.0, 3.0, 2.0, 1.0], help="rows a token")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [measure(options, bound, device) for bound in (None, *options.bounds)]
    print("| rows a token at most | rows | cut | peak MB | bytes a row |\n|---|---|---|---|---|")
    for row in rows:
        bound = "no bound" if row["bound"] is None else f"{row['bound']:g}"
        peak, per_row = row["peak_bytes"] / 1e6, row["peak_bytes"] / row["rows"]
        print(f"| {bound} | {row['rows']} | {row['cut']} | {peak:.1f} | {per_row:.0f} |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    kept = all(row["bound"] is None or row["rows"] <= max(row["bound"], 1) * options.tokens for row in rows)
    return 0 if kept else 1


def measure(options: argparse.Namespace, bound: float | None, device: str) -> dict[str, float | None]:
    """Rows, cut assignments and peak bytes of one forward and backward pass under ``bound`` rows a token."""
    torch.manual_seed(0)
    inner, width = options.expert_width, options.width
    x_TD = torch.randn(options.tokens, width, device=device, requires_grad=True)
    router_ED = (torch.randn(options.experts, width, device=device) * 0.006).requires_grad_()
    fc1 = (torch.randn(options.experts, 2 * inner, width, device=device) * 0.02).requires_grad_()
    fc2 = (torch.randn(options.experts, width, inner, device=device) * 0.02).requires_grad_()
    config = DynMoEConfig(top_p=options.top_p, max_rows_per_token=bound)
    counted = {}

    def step() -> torch.Tensor:
        for leaf in (x_TD, router_ED, fc1, fc2):
            leaf.grad = None
        routing = route(x_TD, router_ED, config)
        plan = RoutePlan.build(routing.map_TE)
        rows, weights, transport = dispatch(x_TD, routing.weights_TE, plan)
        out = combine(grouped_mlp(rows, weights, fc1, fc2, plan.rows_L), transport, options.tokens)
        out.square().mean().backward()
        counted.update(rows=plan.rows_sent, cut=int(routing.cut))
        return out

    return {"bound": bound, "peak_bytes": peak_of(step, device), **counted}


if __name__ == "__main__":
    sys.exit(main())
