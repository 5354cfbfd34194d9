"""One rank of ``bench_moe_layer.py``: time the methods of a case in turn, then weigh their memory.

Time: every round runs every method once, in another order each round, so that whatever drifts (clocks, neighbours)
touches all alike; a round's time of a method is that of its slowest rank; the median over rounds is kept.
Memory: a pass of its own, untimed. On CUDA the allocator's peak; on the CPU the peak of what torch's allocator handed
out, from the profiler's record of every allocation, temporaries inside kernels included. Either way what was there
before (inputs, weights) is not counted, and gradients are.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from benchmarks.competitors import FLOOR, build
from benchmarks.competitors.case import Case, Setting
from benchmarks.competitors.method import Method, NotPossible, Wire
from benchmarks.report import Output

WARM_UP = 1
# A method this many times slower than the floor is timed in SLOW_ROUNDS rounds only: its median needs no precision.
SLOW, SLOW_ROUNDS = 5.0, 3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure.

    Attributes:
        methods: names; the floor is among them.
        settings: the cases, in order.
        repeats: rounds. seconds: stop early, after one round a case at least, to end in about this time; or ``None``.
        threads: CPU threads of each rank, or ``None`` to divide the cores among the ranks.
    """

    methods: Sequence[str]
    settings: Sequence[Setting]
    repeats: int
    seconds: float | None
    threads: int | None
    cuda: bool


Row = dict[str, Any]


def rank_main(rank: int, ranks: int, plan: Plan, folder: str, output: Output) -> None:
    """Measure all cases; rank 0 hands all rows so far to ``output`` after each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the starting process hears it and ends the ranks
    backend = "cpu:gloo,cuda:nccl" if plan.cuda else "gloo"
    store = dist.FileStore(os.path.join(folder, "store"), ranks)
    device = f"cuda:{rank}" if plan.cuda else "cpu"
    if plan.cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    groups = {ep: dist.new_group(list(range(ep))) for ep in {setting.ep for setting in plan.settings}}
    alone = [dist.new_group([r]) for r in range(ranks)][rank]
    rows: list[Row] = []
    total = len(plan.settings) * (WARM_UP + plan.repeats + 1)
    with tqdm(total=total, unit="round", disable=None if rank == 0 else True) as bar:
        begin = time.monotonic()
        for number, setting in enumerate(plan.settings):
            if rank < setting.ep:
                torch.set_num_threads(plan.threads or max(1, len(os.sched_getaffinity(0)) // setting.ep))
                case = Case.make(setting, rank, device, groups[setting.ep], alone)
                left = plan.seconds and plan.seconds - (time.monotonic() - begin)
                rows += measure(case, plan, bar.update, left and left / (len(plan.settings) - number))
            if rank == 0:
                output.update(rows)
            dist.barrier()  # ranks without work in a case wait here, asleep
    if rank == 0:
        output.finish(rows)
    dist.destroy_process_group()


def settings_of(
    *, mean_k: Sequence[float], histogram: Sequence[str], ep: Sequence[int], **shape: Any
) -> Iterator[Setting]:
    """Every combination, the cheap ones first."""
    for ranks, name, k in product(ep, histogram, mean_k):
        yield Setting(mean_k=k, histogram=name, ep=ranks, **shape)


def measure(case: Case, plan: Plan, advance: Callable[[], Any], seconds: float | None) -> list[Row]:
    """Time and weigh every method that can run the case; in about ``seconds``, if they are given.

    Returns:
        one row a method, the floor's included; times in seconds, sizes in bytes.
    """
    methods = list(_possible(plan.methods, case))
    times: dict[str, list[float]] = {method.name: [] for method in methods}
    begin = time.monotonic()
    for turn in range(WARM_UP + plan.repeats):
        if (
            seconds is not None
            and turn > WARM_UP
            and _of_all_ranks([time.monotonic() - begin], case, dist.ReduceOp.MAX)[0] > seconds
        ):
            advance()
            continue
        # Another order each round, the same on all ranks: what runs before leaves the caches as it likes them.
        for method in random.Random(turn).sample(methods, len(methods)):
            taken = times[method.name]
            if turn >= WARM_UP + SLOW_ROUNDS and statistics.median(taken) > SLOW * statistics.median(times[FLOOR]):
                continue
            seconds = _of_all_ranks([time_one(method, case)], case, dist.ReduceOp.MAX)[0]
            if turn >= WARM_UP:
                taken.append(seconds)
        advance()
    floor = statistics.median(times[FLOOR])
    rows = [_row(method, case, statistics.median(times[method.name]), floor) for method in methods]
    advance()
    return rows


def _possible(names: Sequence[str], case: Case) -> Iterator[Method]:
    for name in names:
        try:
            yield build(name, case)
        except NotPossible as reason:
            if case.rank == 0:
                tqdm.write(f"mean k {case.setting.mean_k:g}: no {name}: {reason}")


def _row(method: Method, case: Case, seconds: float, floor: float) -> Row:
    setting, peak = case.setting, peak_bytes(method, case)
    wire: Wire = method.wire()
    sent = _of_all_ranks([wire.rows, wire.bytes], case, dist.ReduceOp.SUM)
    return {
        "method": method.name,
        "mean_k": setting.mean_k,
        "histogram": setting.histogram,
        "ep": setting.ep,
        "tokens": setting.tokens,
        "seconds": seconds,
        "floor_seconds": floor,
        "rows_sent": int(sent[0]),
        "bytes_sent": int(sent[1]),
        "peak_bytes": int(_of_all_ranks([peak], case, dist.ReduceOp.MAX)[0]),
    }


def _of_all_ranks(values: list[float], case: Case, operation: Any) -> list[float]:
    together = torch.tensor(values, dtype=torch.float64, device=case.x_TD.device)
    dist.all_reduce(together, op=operation, group=case.group)
    return together.tolist()


def time_one(method: Method, case: Case) -> float:
    """Seconds of one forward and backward pass on this rank; all ranks start together."""
    method.clear()
    dist.barrier(group=case.group)
    if case.x_TD.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        method.step()
        end.record()
        end.synchronize()
        seconds = start.elapsed_time(end) / 1e3
    else:
        begin = time.perf_counter()
        out = method.step()
        seconds = time.perf_counter() - begin
        del out  # freeing is not timed, for no method
    method.clear()
    return seconds


def peak_bytes(method: Method, case: Case) -> int:
    """Bytes that one pass needs at its peak beyond its inputs and weights."""
    method.clear()
    peak = peak_of(method.step, case.x_TD.device.type)
    method.clear()
    return peak


def peak_of(step: Callable[[], Any], device: str) -> int:
    """Bytes that ``step`` needs at its peak beyond what was there before, on "cpu" or "cuda"."""
    if device == "cpu":
        return _peak_on_cpu(step)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(step: Callable[[], Any]) -> int:
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True, acc_events=True) as profiler:
        out = step()
    del out
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak
