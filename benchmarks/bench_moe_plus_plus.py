"""What zero-computation experts save: the expert part of a plain top-2 MoE and of MoE++ with the same FFN experts.

    python benchmarks/bench_moe_plus_plus.py --quick                              # under a minute on two cores
    python benchmarks/bench_moe_plus_plus.py --json rows.json --markdown table.md

Timed is what lies between the routing map and the summed output: plan, pack, grouped experts, unpack and, in MoE++,
the zero-computation experts; forward, or with ``--backward`` both passes. Both layers get the same input and FFN
weights, and maps as the balance loss intends them: of the 2 T assignments exactly the share

    tau N_FFN / (tau N_FFN + N_ZC)        (Jin et al. 2024, arXiv 2410.07348, table 1)

goes to FFN experts, evenly, and the rest to the others, evenly; which tokens they are is drawn. The inverse of that
share is the gain that counting GEMMs predicts. Beside it the zero-computation experts alone: as one expression, which
the library computes, and as a loop over experts with gather and index_add, which the public code runs. And, forward,
the gain of the grouped GEMMs alone, on rows that lie ready: where few rows meet large weights it is below the count,
so the fewer the tokens, the smaller the gain.

A round runs all of them once, in another order each round; ratios are taken within a round, and their median is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

from benchmarks.zero_computation_case import FORWARD_ONLY, METHODS, Case, Setting  # noqa: E402

FULL = {"tokens": 16384, "width": 768, "expert_width": 2048, "repeats": 7}  # widths: the paper's 0.6B, 1B and 2B
QUICK = {"tokens": 2048, "width": 256, "expert_width": 704, "repeats": 5, "threads": 1}
WANTED = 0.95  # of the predicted gain

Row = dict[str, Any]


def measure(
    setting: Setting,
    case: Case,
    *,
    repeats: int,
    backward: bool,
    advance: Callable[[], Any],
    clock: Callable[[], float] = time.perf_counter,
) -> Row:
    """Time all methods in turn; the first round warms up."""
    methods = METHODS if backward else METHODS | FORWARD_ONLY
    times: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(1 + repeats):
        # Another order each round: what runs before leaves the caches as it likes them.
        for name in random.Random(turn).sample(list(methods), len(methods)):
            times[name].append(time_one(methods[name], case, backward=backward, clock=clock))
        advance()

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(times[above][1:], times[below][1:], strict=True))

    gain = ratio("plain", "moe++")
    return {
        "ffn": setting.ffn,
        "free": setting.free,
        "tau": setting.tau,
        "tokens": setting.tokens,
        "backward": backward,
        "ffn_rows": setting.ffn_rows,
        **{f"{name}_seconds": statistics.median(taken[1:]) for name, taken in times.items()},
        "gain": gain,
        "predicted": setting.predicted,
        "reached": gain / setting.predicted,
        "gemms_reached": None if backward else ratio("plain_gemms", "moe++_gemms") / setting.predicted,
        "loop_over_fused": ratio("loop", "fused"),
        "load": os.getloadavg()[0],
    }


def time_one(
    method: Callable[[Case], Tensor], case: Case, *, backward: bool, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of one forward pass, or forward and backward; ``clock`` is read on the CPU only."""
    import torch

    def step() -> Tensor:
        with torch.set_grad_enabled(backward):
            out = method(case)
        if backward:
            out.backward(case.grad_TD)
        return out

    case.clear()
    if case.x_TD.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = clock()
    out = step()
    seconds = clock() - begin
    del out  # freeing is not timed, for no method
    return seconds


def table(rows: list[Row]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [
        "| experts | tau | FFN rows | plain ms | MoE++ ms | gain | predicted | reached | GEMMs "
        "| fused ms | loop ms | loop / fused |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        plain_ms, moe_ms, fused_ms, loop_ms = (row[f"{name}_seconds"] * 1e3 for name in METHODS)
        alone = "" if row["gemms_reached"] is None else f"{row['gemms_reached']:.3f}"
        lines.append(
            f"| {row['ffn']}+{row['free']} | {row['tau']:g} | {row['ffn_rows']} | {plain_ms:.1f} | {moe_ms:.1f} "
            f"| {row['gain']:.2f} | {row['predicted']:.2f} | {row['reached']:.3f} | {alone} "
            f"| {fused_ms:.2f} | {loop_ms:.2f} | {row['loop_over_fused']:.2f} |"
        )
    return lines


def findings(rows: list[Row]) -> Iterator[str]:
    """What the rows say about the gain and about the fused expression."""
    for what, field, wanted in (
        ("gain / predicted gain", "reached", f"at least {WANTED:g}"),
        ("loop / fused, time of the zero-computation experts alone", "loop_over_fused", "above 1"),
    ):
        least = min(rows, key=lambda row: row[field])
        mean = statistics.mean(row[field] for row in rows)
        case = f"{least['ffn']}+{least['free']}, tau {least['tau']:g}"
        yield f"- {what}: smallest {least[field]:.3f} ({case}), mean {mean:.3f}; wanted {wanted}"
    if all(row["gemms_reached"] for row in rows):
        quotients = [row["reached"] / row["gemms_reached"] for row in rows]
        least, mean = min(quotients), statistics.mean(quotients)
        yield f"- the same / that of the GEMMs alone: smallest {least:.3f}, mean {mean:.3f}"
    loads = [row["load"] for row in rows]
    yield f"- load of the machine (1 minute) after each row: {min(loads):.1f} to {max(loads):.1f}, this run included"


def main(argv: list[str] | None = None) -> int:
    """Measure and report; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    import torch

    cuda = torch.cuda.is_available() and not options.cpu
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.dtype = options.dtype or ("bfloat16" if cuda else "float32")
    reason = _why_not(options)
    if reason:
        parser.error(reason)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        _run(options, "cuda" if cuda else "cpu")
    except KeyboardInterrupt:
        print("interrupted; the files hold the rows that were finished.", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace, device: str) -> None:
    import torch
    from tqdm import tqdm

    shape = {name: getattr(options, name) for name in ("tokens", "width", "expert_width")}
    settings = [Setting(ffn=f, free=z, tau=tau, **shape) for f, z in options.sizes for tau in options.tau]
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU threads: {torch.get_num_threads()}"
    head = (
        f"{options.tokens} tokens, width {options.width}, SwiGLU experts of width {options.expert_width}, top-2, "
        f"{options.dtype}, {where}, torch {torch.__version__}; forward{' and backward' * options.backward}, "
        f"medians of {options.repeats} interleaved rounds{', of CPU time' * options.cpu_time}."
    )
    how = {
        "repeats": options.repeats,
        "backward": options.backward,
        "clock": time.process_time if options.cpu_time else time.perf_counter,
    }
    rows: list[Row] = []
    tqdm.write("\n".join([head, "", *table(rows)]), file=sys.stdout)
    with tqdm(total=len(settings) * (1 + options.repeats), unit="round", disable=None) as bar:
        for setting in settings:
            case = Case.make(setting, device, getattr(torch, options.dtype))
            row = measure(setting, case, **how, advance=bar.update)
            rows.append(row)
            tqdm.write(table([row])[-1], file=sys.stdout)
            sys.stdout.flush()
            if options.json:
                _replace(options.json, json.dumps(rows, indent=1))
            if options.markdown:
                _replace(options.markdown, "\n".join([head, "", *table(rows), "", *findings(rows)]))
    print("\n" + "\n".join(findings(rows)), flush=True)


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(text + "\n", encoding="utf-8")
    os.replace(beside, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--tokens", type=int, help="tokens (default: 16384)")
    add("--width", type=int, help="model width (default: 768)")
    add("--expert-width", type=int, help="inner width of a SwiGLU expert (default: 2048)")
    add("--sizes", metavar="LIST", default="8+4,16+4,32+8", help="FFN+zero-computation experts (default: %(default)s)")
    add("--tau", metavar="LIST", default="0.1,0.25,0.5,0.75,1", help="default: %(default)s")
    add("--backward", action="store_true", help="time forward and backward (default: forward)")
    add("--dtype", choices=["float32", "bfloat16"], help="default: float32 on the CPU, bfloat16 on a GPU")
    add("--repeats", type=int, help="timed rounds (default: 7)")
    add("--threads", type=int, help="CPU threads (default: all cores; 1 if quick)")
    add("--quick", action="store_true", help="small sizes and fewer rounds, for what is not given")
    add(
        "--cpu-time",
        action="store_true",
        help="on the CPU: seconds of this process, not of the clock",
    )
    add("--cpu", action="store_true", help="the CPU also where there is a GPU")
    for name, what in {"json": "rows", "markdown": "table"}.items():
        add(f"--{name}", type=Path, metavar="FILE", help=f"write the {what} here, again after every row")
    return parser


def _why_not(options: argparse.Namespace) -> str | None:
    """Why this cannot be measured, in one sentence; turns the lists into numbers."""
    for name in ("tokens", "width", "expert_width", "repeats", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            return f"--{name.replace('_', '-')} is {getattr(options, name)}; accepted: 1 or more."
    for name in ("width", "expert_width"):  # grouped_mm reads rows in units of 16 bytes
        if getattr(options, name) % 8:
            return f"--{name.replace('_', '-')} is {getattr(options, name)}; accepted: multiples of 8."
    try:
        sizes = [tuple(int(part) for part in size.split("+")) for size in options.sizes.split(",")]
    except ValueError:
        sizes = [()]
    if any(len(size) != 2 or min(size) < 3 for size in sizes):
        return f"--sizes is '{options.sizes}'; accepted: as 8+4,16+4, both at least 3."
    try:
        taus = [float(part) for part in options.tau.split(",")]
    except ValueError:
        taus = [0.0]
    if not all(0 < tau <= 1 for tau in taus):
        return f"--tau is '{options.tau}'; accepted: numbers above 0, at most 1, with commas between them."
    if options.cpu_time and options.threads != 1:
        return "--cpu-time is given, which counts waiting threads as well; accepted: with --threads 1."
    options.sizes, options.tau = sizes, taus
    return None


def keep_freed_memory() -> None:
    """Begin again with a malloc that keeps what was freed, as CUDA's allocator does and ``bench_moe_layer.py`` too.

    Otherwise the time of every method contains some tenth of fresh pages. Malloc reads its settings once, at the start
    of a process.
    """
    wanted = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    if not wanted.keys() <= os.environ.keys():
        os.execve(sys.executable, sys.orig_argv, wanted | os.environ)


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
