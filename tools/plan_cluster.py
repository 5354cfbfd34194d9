#!/usr/bin/env python
"""Plan a training run on paper: memory, rows and bytes on each link, and step time of every TP x PP x EP layout.

Model: Megatron's flags, here or in the file --model names (what is given here wins). Routing: --metrics-file of a run,
or --mean-k, uniform or with --zipf-exponent. See docs/cluster.md for what is counted and what is not.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from megatron_dynmoe.planning import Cluster, Histogram, PlanError, plan_all, to_markdown
from megatron_dynmoe.planning.flags import add_model_flags, model_of, read_flags


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    result.add_argument("--model", type=Path, help="Megatron's flags in a file, or a .json object of their names")
    add_model_flags(result)
    cluster = result.add_argument_group("cluster")
    cluster.add_argument("--nodes", type=int, required=True)
    cluster.add_argument("--gpus-per-node", type=int, default=8)
    cluster.add_argument("--nvlink-gb-s", type=float, required=True, help="GB/s a GPU sends inside its node")
    cluster.add_argument("--network-gb-s", type=float, required=True, help="GB/s a GPU sends to other nodes")
    cluster.add_argument("--tflops", type=float, required=True, help="TFLOP/s a GPU achieves in the model's GEMMs")
    cluster.add_argument("--gpu-memory-gb", type=float, required=True)
    routing = result.add_argument_group("routing")
    routing.add_argument("--metrics-file", type=Path, help="what a run wrote with --moe-metrics-file")
    routing.add_argument("--mean-k", type=float, help="mean experts per token")
    routing.add_argument("--zipf-exponent", type=float, help="popularity of experts; 0, the default, is uniform")
    output = result.add_argument_group("output")
    output.add_argument("--format", choices=("markdown", "json"), default="markdown")
    output.add_argument("--output", type=Path, help="default: standard output")
    output.add_argument("--top", type=int, default=20, help="layouts in the Markdown tables; JSON has all of them")
    return result


def histogram_of(args: argparse.Namespace, *, experts: int, moe_layers: int) -> Histogram:
    """The routing that the flags name."""
    if (args.metrics_file is None) == (args.mean_k is None):
        raise PlanError("the routing is one of --metrics-file (of a run) and --mean-k (assumed); give one of the two.")
    if args.metrics_file is None:
        return Histogram.zipf(experts=experts, mean_k=args.mean_k, exponent=args.zipf_exponent or 0.0)
    if args.zipf_exponent is not None:
        raise PlanError("--zipf-exponent goes with --mean-k; a --metrics-file says itself how loads differ.")
    return Histogram.measured(args.metrics_file, experts=experts, moe_layers=moe_layers)


def report(args: argparse.Namespace) -> str:
    """The plan as text."""
    model = model_of(args)
    if args.top < 1:
        raise PlanError(f"--top is {args.top}; accepted: at least 1.")
    cluster = Cluster(
        nodes=args.nodes,
        gpus=args.gpus_per_node,
        nvlink=args.nvlink_gb_s * 1e9,
        network=args.network_gb_s * 1e9,
        flops=args.tflops * 1e12,
        memory=args.gpu_memory_gb * 1e9,
    )
    histogram = histogram_of(args, experts=model.experts, moe_layers=sum(model.moe))
    sharded = args.use_distributed_optimizer
    records = plan_all(model, cluster, histogram, unit=args.moe_dispatch_unit, distributed_optimizer=sharded)
    if args.format == "json":
        return json.dumps({"routing": histogram.source, "layouts": records}, indent=1) + "\n"
    title = f"{cluster.nodes} x {cluster.gpus} GPUs; routing: {histogram.source}"
    return to_markdown(records, title=title, most=args.top)


def write(text: str, path: Path | None) -> None:
    """To a file, whole or not at all, or to standard output."""
    if path is None:
        sys.stdout.write(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def main(argv: list[str] | None = None) -> int:
    """Parse, plan, report; 1 with one sentence on stderr."""
    # What the file says has to be known before the rest is parsed, so that the rest wins.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", type=Path)
    known, _ = first.parse_known_args(argv)
    try:
        defaults = read_flags(known.model) if known.model else None
        args = parser().parse_args(argv, defaults)
        write(report(args), args.output)
    except (PlanError, OSError) as error:
        print(f"plan_cluster: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
