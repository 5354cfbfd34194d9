"""The routed part of an MoE layer, side by side: ours, megatron-core's, a loop, dense dispatch, and the bare GEMMs.

    python benchmarks/bench_moe_layer.py --quick                                  # under a minute on two cores
    python benchmarks/bench_moe_layer.py --json rows.json --markdown table.md --plot time.png

One run, one set of processes, the same inputs, routing map, routing weights and expert weights for every method; what
is timed lies between the router and the sum over a token's experts, forward and backward. On the CPU with gloo ranks,
on GPUs with one GPU a rank. How time and memory are taken is said in ``benchmarks/measure.py``, the methods are in
``benchmarks/competitors/``.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory pass uses torch's profiler, which announces itself

FULL = {"tokens": 4096, "width": 512, "expert_width": 1408, "experts": 16, "mean_k": "1,2,4,8,16", "repeats": 7}
QUICK = {"tokens": 512, "width": 128, "expert_width": 352, "experts": 8, "mean_k": "1,2,8", "repeats": 3, "threads": 1}
QUICK_SECONDS = 15.0  # beside some ten for imports
ON_GPU = {"tokens": 16384, "width": 2048}


def main(argv: list[str] | None = None) -> int:
    """Measure and report; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    import torch

    cuda = torch.cuda.is_available() and not options.cpu
    _fill_in(options, cuda)
    reason = _why_not(options, cuda)
    if reason:
        parser.error(reason)
    from benchmarks.measure import Plan, settings_of
    from benchmarks.report import Output

    names = ("tokens", "width", "expert_width", "experts", "mean_k", "histogram", "ep")
    plan = Plan(
        methods=options.methods,
        settings=tuple(settings_of(**{n: getattr(options, n) for n in names}, dtype=getattr(torch, options.dtype))),
        repeats=options.repeats,
        seconds=QUICK_SECONDS if options.quick else None,
        threads=options.threads,
        cuda=cuda,
    )
    try:
        return _run(plan, Output(_head(options, cuda), options.json, options.markdown, options.plot))
    except KeyboardInterrupt:
        print("interrupted; the files hold the cases that were finished.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--tokens", type=int, help="tokens of each rank (default: 4096; 16384 on a GPU)")
    add("--width", type=int, help="model width (default: 512; 2048 on a GPU)")
    add("--expert-width", type=int, help="inner width of a SwiGLU expert (default: 1408)")
    add("--experts", type=int, help="experts over all ranks (default: 16)")
    add("--mean-k", metavar="LIST", help="experts per token, averaged over tokens (default: 1,2,4,8,16)")
    add("--histogram", metavar="LIST", default="balanced,skewed", help="balanced, skewed (Zipf) or both (default)")
    add("--ep", metavar="LIST", help="expert-parallel ranks (default: 1,2; 1 with one GPU)")
    add("--dtype", choices=["float32", "bfloat16"], help="default: float32 on the CPU, bfloat16 on a GPU")
    add("--repeats", type=int, help="timed rounds (default: 7)")
    add("--methods", metavar="LIST", help="default: all; the floor is always measured")
    add("--threads", type=int, help="CPU threads of each rank (default: all cores, divided by the ranks; 1 if quick)")
    add("--quick", action="store_true", help="small sizes and fewer rounds, for what is not given")
    add("--cpu", action="store_true", help="the CPU also where there is a GPU")
    for name, what in {"json": "rows", "markdown": "table", "plot": "picture (needs matplotlib)"}.items():
        add(f"--{name}", type=Path, metavar="FILE", help=f"write the {what} here")
    return parser


def _fill_in(options: argparse.Namespace, cuda: bool) -> None:
    """Defaults that depend on other flags; lists from their text."""
    import torch

    from benchmarks.competitors import METHODS

    defaults = QUICK if options.quick else FULL | (ON_GPU if cuda else {})
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.dtype = options.dtype or ("bfloat16" if cuda else "float32")
    options.ep = options.ep or ("1" if cuda and torch.cuda.device_count() == 1 else "1,2")
    options.methods = options.methods.split(",") if options.methods else list(METHODS)
    options.histogram = options.histogram.split(",")


def _why_not(options: argparse.Namespace, cuda: bool) -> str | None:
    """Why this cannot be measured, in one sentence; turns the lists of numbers into numbers."""
    import torch

    from benchmarks.competitors import FLOOR, METHODS
    from benchmarks.competitors.case import HISTOGRAMS

    for name, kind in (("mean_k", float), ("ep", int)):
        text, flag = getattr(options, name), name.replace("_", "-")
        try:
            setattr(options, name, [kind(part) for part in text.split(",")])
        except ValueError:
            return f"--{flag} is '{text}'; accepted: numbers with commas between them."
    for name, valid in (("methods", METHODS), ("histogram", HISTOGRAMS)):
        unknown = [part for part in getattr(options, name) if part not in valid]
        if unknown:
            return f"--{name} has '{unknown[0]}'; accepted: {', '.join(valid)}."
    if FLOOR not in options.methods:
        options.methods.append(FLOOR)
    for name in ("tokens", "width", "expert_width", "experts", "repeats", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            return f"--{name.replace('_', '-')} is {getattr(options, name)}; accepted: 1 or more."
    for name in ("width", "expert_width"):  # grouped_mm reads rows in units of 16 bytes
        if getattr(options, name) % 8:
            return f"--{name.replace('_', '-')} is {getattr(options, name)}; accepted: multiples of 8."
    if options.plot and options.plot.suffix not in (".png", ".pdf", ".svg"):
        return f"--plot is {options.plot}; accepted: a name that ends in .png, .pdf or .svg."
    for k in options.mean_k:
        if not 1 <= k <= options.experts:
            return f"--mean-k has {k:g}; accepted: 1 to {options.experts}, the number of experts."
    for ranks in options.ep:
        if ranks < 1 or options.experts % ranks:
            return f"--ep has {ranks}; accepted: divisors of the {options.experts} experts."
        if cuda and ranks > torch.cuda.device_count():
            return f"--ep has {ranks}; accepted: up to {torch.cuda.device_count()}, one rank a GPU."
    return None


def _head(options: argparse.Namespace, cuda: bool) -> str:
    import torch

    threads = f"{options.threads} a rank" if options.threads else f"{len(os.sched_getaffinity(0))} shared by the ranks"
    device = torch.cuda.get_device_name() if cuda else f"CPU threads: {threads}"
    return (
        f"{options.tokens} tokens a rank, width {options.width}, {options.experts} SwiGLU experts of width "
        f"{options.expert_width}, {options.dtype}, {device}, torch {torch.__version__}; forward and backward, "
        f"median of {options.repeats} interleaved rounds."
    )


def _run(plan: Any, output: Any) -> int:
    """Start the ranks and wait for them."""
    import multiprocessing

    from torch import multiprocessing as ranks_of

    from benchmarks.competitors import module_of

    # As CUDA's allocator does, let the ranks' malloc keep what was freed: otherwise the time of every method, the floor
    # included, contains some tenth of fresh pages. Set before the processes start, because malloc reads it once.
    os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 40))
    ranks = max(setting.ep for setting in plan.settings)
    # What is slow to import is imported once, by the server that all ranks are forked from.
    multiprocessing.set_forkserver_preload(["benchmarks.measure", *{module_of(name) for name in plan.methods}])
    with tempfile.TemporaryDirectory() as folder:
        from benchmarks.measure import rank_main

        context = ranks_of.start_processes(
            rank_main, (ranks, plan, folder, output), ranks, join=False, daemon=True, start_method="forkserver"
        )
        while not context.join():
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
