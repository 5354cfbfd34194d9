"""What is logged beside Megatron's own: work that was really done, and a metrics file that programs can read."""

from __future__ import annotations

import copy
import json
import os
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.training import get_args, get_timers, is_last_rank
from megatron.training.training import num_floating_point_operations
from torch import Tensor

from megatron_dynmoe.mcore.controllers import Driver
from megatron_dynmoe.mcore.tracker import RoutingTracker
from megatron_dynmoe.metrics import RoutingSummary
from megatron_dynmoe.model_shape import ModelShape
from megatron_dynmoe.training.arguments import dynmoe_from_args
from megatron_dynmoe.training.interval import IntervalSums
from megatron_dynmoe.training.step import LossSums


def model_shape(args: Namespace) -> ModelShape:
    """The shape of the model that Megatron's parsed flags describe."""
    experts = args.num_experts or 0
    beside = dynmoe_from_args(args).parameters_beside(experts, args.hidden_size) if experts else 0
    return ModelShape.from_args(args, vocabulary=args.padded_vocab_size, router_extra=beside)


def routed_flops(args: Namespace, experts_per_token: float, batch_size: int) -> float:
    """Floating-point operations of one iteration, forward and backward, with the experts that tokens really visited.

    Megatron's own count takes ``moe_router_topk`` for every token (training.py, num_floating_point_operations); it is
    linear in that number, so its value at the measured mean is exact.
    """
    measured = copy.copy(args)
    measured.moe_router_topk = experts_per_token
    return num_floating_point_operations(measured, batch_size)


class MetricsFile:
    """Appends JSON lines; each is written in one call, so that a killed run leaves whole lines."""

    def __init__(self, path: str | None) -> None:
        self.path = Path(path) if path else None

    def write(self, record: dict[str, Any]) -> None:
        """Append ``record`` (on the last rank, where Megatron logs)."""
        if self.path is None or not is_last_rank():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = (json.dumps(record) + "\n").encode()
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(handle, line)
        except OSError as error:  # a full disk is told without a path
            error.filename = str(self.path)
            raise
        finally:
            os.close(handle)


def log_interval(
    file: MetricsFile,
    driver: Driver,
    interval: IntervalSums,
    iteration: int,
    iterations: int,
    summary: RoutingSummary,
    sums: dict[str, Any],
) -> dict[str, float]:
    """Rates and sizes of one log interval; also written to ``file``.

    Args:
        file: where records go.
        driver: of the model's controllers.
        interval: of this run.
        iteration: the iteration that ended the interval.
        iterations: how many the summary counts.
        summary: what was routed in it.
        sums: Megatron's ``total_loss_dict``.

    Returns:
        scalars for the console, TensorBoard and W&B.
    """
    args = get_args()
    clock = {"interval time": get_timers()("interval-time").elapsed(reset=False)}
    own = interval.of(sums | mtp_losses(sums) | clock, iterations)
    advanced = own.get("advanced iterations", 0.0)
    seconds = own["interval time"] / max(advanced + own.get("skipped iterations", 0.0), 1)
    flops = routed_flops(args, summary.experts_per_token, args.global_batch_size)
    scalars = {
        "activated_parameters": model_shape(args).activated(summary.experts_per_token),
        "routed_rows": summary.routed_rows / iterations,
        "rows_sent": summary.traffic.rows / iterations,
        "rows_crossing": summary.traffic.crossing_rows / iterations,
        "bytes_crossing": summary.traffic.crossing_bytes / iterations,
        "rows_cut": summary.cut_rows / iterations,
        "rows_dropped": summary.dropped / iterations,
        "tokens_per_second": args.global_batch_size * args.seq_length / seconds,
        "routed_TFLOP/s/GPU": flops / seconds / args.world_size / 1e12,
    }
    by_layer = log_routers(driver, scalars)
    record = {"iteration": iteration, "seconds_per_iteration": seconds} | summary.scalars() | scalars
    record["experts_per_token_by_layer"] = summary.experts_per_token_by_layer
    record["unrouted_tokens_by_layer"] = summary.unrouted_by_layer
    record["free_tokens_by_layer"] = summary.kinds_by_layer
    record |= by_layer
    for name, value in own.items():
        if name.endswith("loss"):
            record[name.replace(" ", "_")] = value / max(advanced, 1)
    file.write(record)
    return scalars


def mtp_losses(sums: dict[str, Any]) -> dict[str, Tensor]:
    """Sums over the interval of the losses of multi-token prediction, by Megatron's names; on the last pipeline stage.

    Megatron adds the last iteration's to its ``total_loss_dict`` only after the report of the routing
    (training.py:2798), so it is added here.  Every rank of the stage calls this.
    """
    tracker = MTPLossLoggingHelper.tracker
    if "loss_values" not in tracker:
        return {}
    values, group = tracker["loss_values"] / get_num_microbatches(), tracker["avg_group"]
    torch.distributed.all_reduce(values, group=group)
    values /= group.size()
    return {name: sums.get(name, 0) + value for layer, value in enumerate(values, 1) for name in [f"mtp_{layer} loss"]}


def log_routers(driver: Driver, scalars: dict[str, float]) -> dict[str, Any]:
    """What controllers and methods say of the routers; every rank calls it.

    Args:
        driver: of the model's controllers; what they did since the last call is printed.
        scalars: gets the means over layers.

    Returns:
        for the metrics file: every value by layer, and what was done.
    """
    if not driver.reports():
        return {}
    events, layers = driver.report()
    record: dict[str, Any] = {}
    for name in dict.fromkeys(name for about in layers.values() for name in about):
        values = {layer: about[name] for layer, about in layers.items() if name in about}
        if not any(isinstance(value, list) for value in values.values()):
            scalars[name] = sum(values.values()) / len(values)
        record[f"{name}_by_layer"] = values
    for field in filter(None, (kind.events for kind in driver.kinds)):
        record[field] = [asdict(event) for event in events]
    if is_last_rank():
        for event in events:
            print(f" {event}", flush=True)
    return record


def log_evaluation(file: MetricsFile, tracker: RoutingTracker, losses: LossSums) -> None:
    """Write the held-out loss and the routing of the same tokens; every rank calls it at the end of an evaluation."""
    summary = tracker.evaluation_stats.reduce(divide_by=tracker.copies)
    sums = losses.take()
    if sums is None:  # not the last pipeline stage
        return
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    loss, tokens = sums.tolist()
    args, kind = get_args(), "test" if _on_test_set() else "validation"
    record = {
        "iteration": args.iteration if tracker.iteration is None else tracker.iteration,
        f"{kind}_loss": loss / tokens,
        f"{kind}_tokens": int(tokens),
    }
    if args.multiple_validation_sets and kind == "validation":  # Megatron evaluates them in order
        names = args.validation_set_names or [str(index) for index in range(len(args.eval_iters))]
        record["validation_set"] = names[(losses.taken - 1) % len(names)]
    record |= summary.scalars()
    record["experts_per_token_by_layer"] = summary.experts_per_token_by_layer
    record["free_tokens_by_layer"] = summary.kinds_by_layer
    file.write(record)


def _on_test_set() -> bool:
    """Whether Megatron is evaluating the test set, which only the words that it prints say (training.py:1493)."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != "evaluate_and_print_results":
        frame = frame.f_back
    return frame is not None and str(frame.f_locals.get("prefix")).endswith("on test set")
