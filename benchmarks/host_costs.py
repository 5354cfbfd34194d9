"""What the host spends on one layer's plan and moves, which on a GPU is what launches cost.

    python benchmarks/host_costs.py
    python benchmarks/host_costs.py --against ../older-checkout

One process stands for rank 0 of the expert-parallel group: the group is torch's fake one, which sends nothing and hands
rank 0's own counts out as everybody's.  Rows are 16 numbers wide, so that little but the calls is left, on one thread.
A figure is the least CPU time of the process over all rounds, which other work on the machine disturbs least.  With
--against, another checkout of the library is measured in turns with this one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
TURNS = 3


def parts(options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Each part as a function: the plan, and plan, dispatch and combine, forward and backward."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_dynmoe.dispatch import combine, dispatch
    from megatron_dynmoe.dispatch.align import align_rows, unalign_rows
    from megatron_dynmoe.routing import RoutePlan

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("fake", rank=0, world_size=options.ranks, store=FakeStore())
    map_TE = torch.zeros(options.tokens, options.experts, dtype=torch.bool)
    map_TE.scatter_(1, torch.rand(options.tokens, options.experts).topk(options.k).indices, True)
    x_TD = torch.randn(options.tokens, 16, requires_grad=True)
    weights_TE = torch.where(map_TE, torch.rand(map_TE.shape), 0.0).requires_grad_()

    def plan() -> RoutePlan:
        return RoutePlan.build(map_TE, group=dist.group.WORLD, expert_ranks=options.ranks)

    def moves(unit: str) -> None:
        rows, weights, transport = dispatch(x_TD, weights_TE, plan(), dist.group.WORLD, unit=unit)
        out = combine(rows * weights.unsqueeze(-1), transport, options.tokens)
        torch.autograd.grad(out, (x_TD, weights_TE), torch.ones_like(out))

    sizes = plan().rows_per_expert_L
    rows = torch.randn(sum(sizes), 16, requires_grad=True)

    def alignment() -> None:
        back = unalign_rows(align_rows(rows, sizes, 16), sizes, 16)
        torch.autograd.grad(back, rows, torch.ones_like(back))

    return {
        "plan": lambda: plan() and None,
        "plan and moves, a row an expert": lambda: moves("expert"),
        "plan and moves, a row a rank": lambda: moves("rank"),
        "alignment for FP8, rows alone": alignment,
    }


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Microseconds of each part."""
    sys.path.insert(0, str(options.package))
    steps = parts(options)
    least = dict.fromkeys(steps, float("inf"))
    for _ in range(options.rounds):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            least[name] = min(least[name], (time.process_time() - begin) * 1e6)
    return least


def in_turns(options: argparse.Namespace) -> dict[str, list[float]]:
    """[the other checkout, this one] for each part, the least of some turns."""
    found: dict[str, list[float]] = {}
    for _ in range(TURNS):
        for column, package in enumerate((options.against, HERE)):
            command = [sys.executable, __file__, "--package", str(package), "--json"]
            for name in ("tokens", "experts", "ranks", "k", "rounds"):
                command += [f"--{name}", str(getattr(options, name))]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                pair = found.setdefault(name, [float("inf")] * 2)
                pair[column] = min(pair[column], value)
    return found


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("tokens", 512), ("experts", 256), ("ranks", 8), ("k", 8), ("rounds", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--against", type=Path, help="another checkout of the library")
    parser.add_argument("--package", type=Path, default=HERE, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="one line of JSON, in microseconds")
    options = parser.parse_args()
    if options.against is not None:
        print("| part | before, us | now, us |\n|---|---|---|")
        for name, (before, now) in in_turns(options).items():
            print(f"| {name} | {before:.0f} | {now:.0f} |")
        return 0
    least = measure(options)
    if options.json:
        print(json.dumps(least))
        return 0
    print("| part | us |\n|---|---|")
    for name, value in least.items():
        print(f"| {name} | {value:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
