"""Memory: that passes give back what they took, and what a layer keeps beside what the planner says."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu import layers
from benchmarks.gpu.step import Context, StepError

PASSES = 20
WITHIN = 0.1  # the planner's bytes may be so far from what was measured
MODEL = "dynamic_moe_24l"


@contextmanager
def forced_exchanges() -> Iterator[None]:
    """One rank sends to itself through the collective, as several do, instead of handing its rows on."""
    from megatron_dynmoe.dispatch import moves, transport

    class Forced(moves.Exchange):
        def __init__(self, rows: Tensor, output_splits: list[int], input_splits: list[int], group: Any) -> None:
            super().__init__(rows, output_splits, input_splits, group)
            self._out, self._alone = moves._Start.apply(rows, output_splits, input_splits, self), False

    with mock.patch.object(transport, "Exchange", Forced), mock.patch.object(moves, "Exchange", Forced):
        yield


def held() -> int:
    """Bytes that tensors hold: what the allocator gave out on CUDA, else the storages that Python knows."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def leak(context: Context) -> None:
    """Passes of each backend and unit, with Python's collector off: nothing may need it.

    Raises:
        StepError: more is held after them than before.
    """
    from megatron_dynmoe.config import DynMoEConfig

    layers.start_megatron()
    backends = ["torch", "te"] if layers.has_te() else ["torch"]
    grown: dict[str, int] = {}
    for backend in backends:
        for unit in ("expert", "rank"):
            dynmoe = DynMoEConfig(top_p=0.4, expert_backend=backend, dispatch_unit=unit, load_balance_coeff=0.01)
            layer = layers.build(dynmoe, te=backend == "te", dtype=torch.bfloat16)
            with forced_exchanges():
                grown[f"{backend}, rows by {unit}"] = growth(layer)
            context.note(bytes_grown=grown)
    context.note(says=f"{PASSES} passes, {len(grown)} layers: {sum(grown.values())} bytes more")
    if any(grown.values()):
        raise StepError(f"passes do not give back what they took: {grown}.")


def growth(layer: Any) -> int:
    """Bytes held after twenty passes more than before."""
    x, grad = layers.inputs(torch.bfloat16)

    def one_pass() -> None:
        layer.zero_grad(set_to_none=False)
        out, _ = layer(x.detach().requires_grad_())
        out.backward(grad)

    for _ in range(3):  # gradients, and what kernels and libraries take once
        one_pass()
    gc.collect()
    gc.disable()
    try:
        before = held()
        for _ in range(PASSES):
            one_pass()
        return held() - before
    finally:
        gc.enable()


# ---- what a layer keeps ---------------------------------------------------------------------------------------------


def model(*, cpu: bool) -> Any:
    """dynamic_moe_24l as the planner knows it; at toy sizes on the CPU."""
    from dataclasses import replace

    from megatron_dynmoe.planning import flags

    read = flags.read_flags(layers.ROOT / "examples" / "models" / f"{MODEL}.args")
    vars(read).update({"vocab_size": 32000, "micro_batch_size": 8, "global_batch_size": 512})  # pretrain.sh's
    whole = flags.model_of(read)
    small = {"width": 64, "heads": 2, "head_width": 32, "query_groups": 2, "expert_width": 176, "experts": 8}
    return replace(whole, itemsize=2, **(small if cpu else {}))


def layer(context: Context) -> None:
    """Bytes a row, of one layer that is told to send each token to 2 and to 6 experts; the rest is bytes a token.

    Raises:
        StepError: the planner's bytes a row are further from it than :data:`WITHIN`.
    """
    from megatron_dynmoe.planning import memory

    layers.start_megatron()
    sizes = model(cpu=context.cpu)
    tokens = 256 if context.cpu else 16384
    planned = {"row": float(memory.row_bytes(sizes)), "token": float(memory.token_bytes(sizes, moe=True))}
    found: dict[str, dict[str, float]] = {}
    context.note(tokens=tokens, planned=planned)
    for backend in ["torch", "te"] if layers.has_te() else ["torch"]:
        found[backend] = measure(sizes, tokens, backend)
        context.note(measured=found)
    off = {name: planned["row"] / values["row"] - 1 for name, values in found.items()}
    words = [f"{name} {values['row']:.0f}" for name, values in found.items()]
    context.note(
        planner_off=off,
        says=f"bytes a row: planner {planned['row']:.0f}, {', '.join(words)}",
        table=[f"{name}: {values}" for name, values in found.items()],
    )
    if any(abs(value) > WITHIN for value in off.values()):
        raise StepError(f"the planner's bytes a row are off by {', '.join(f'{n} {v:+.0%}' for n, v in off.items())}.")


def measure(sizes: Any, tokens: int, backend: str) -> dict[str, float]:
    """Bytes a row and a token that one layer keeps from forward to backward, and its peaks."""
    kept, peak = {}, {}
    for k in (2, 6):
        kept[k], peak[k] = keeps(sizes, tokens, backend, k)
    row = (kept[6] - kept[2]) / (4 * tokens)
    return {
        "row": row,
        "token_of_moe_part": kept[2] / tokens - 2 * row,
        "kept_k2": kept[2],
        "kept_k6": kept[6],
        "peak_k2": peak[2],
        "peak_k6": peak[6],
    }


def keeps(sizes: Any, tokens: int, backend: str, k: int) -> tuple[int, int]:
    """Bytes kept after a forward pass, and the most that the two passes held; 0 where that cannot be told."""
    from megatron_dynmoe.config import DynMoEConfig
    from megatron_dynmoe.experts.grouped import grouped_linear

    dynmoe = DynMoEConfig(rule="top-k", topk=k, expert_backend=backend)
    shape = {"width": sizes.width, "inner": sizes.expert_width, "experts": sizes.experts}
    fused = {"bias_activation_fusion": True, "moe_permute_fusion": True} if backend == "te" else {}
    moe = layers.build(dynmoe, te=backend == "te", dtype=torch.bfloat16, **shape, **fused)
    if backend == "torch" and layers.device() == "cpu":
        # Chunk by chunk a CPU keeps less; what a GPU keeps is what is planned.
        kind = type(moe.experts)
        moe.experts.__class__ = type(kind.__name__, (kind,), {"linears": (grouped_linear, grouped_linear)})
    x = torch.randn(tokens, 1, sizes.width, device=layers.device()).bfloat16().requires_grad_()
    for _ in range(2):
        moe(x)[0].sum().backward()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    before = held()
    out, count = saved(lambda: moe(x)[0], but=moe.parameters())
    cuda = torch.cuda.is_available()
    kept = held() - before - out.untyped_storage().nbytes() if cuda else count
    out.sum().backward()
    return kept, torch.cuda.max_memory_allocated() - before if cuda else 0


def saved(forward: Callable[[], Tensor], but: Iterable[Tensor]) -> tuple[Tensor, int]:
    """The output of ``forward``, and bytes of what it saved for backward: each storage once, none of ``but``."""
    known = {tensor.untyped_storage().data_ptr() for tensor in but}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    return out, sum(storages.values())
