"""What GEMMs are called with: shapes, dtypes, strides, alignment and checksums, as JSON, and how two recordings differ.

A kernel's contract is more than its shapes: grouped GEMMs want strides and addresses that 16 bytes divide, ends of
groups in int32, one operand by columns.  A recording from a GPU, kept with the tests, lets a machine without one check
that it calls the same functions in the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

OPERATIONS = ("_grouped_mm", "_scaled_grouped_mm", "_scaled_grouped_mm_v2")
TE_GEMMS = ("general_gemm", "general_grouped_gemm")

Call = dict[str, Any]


def described(value: Any) -> Any:
    """A tensor's contract, containers of such, and plain values; a small tensor of integers also has its values."""
    if type(value) in (Tensor, torch.nn.Parameter):
        return tensor(value)
    if hasattr(value, "_fp8_dtype"):  # of Transformer Engine, quantised: its parts are the library's affair
        return {"kind": type(value).__name__, "shape": list(value.size()), "fp8": str(value._fp8_dtype)}
    if isinstance(value, list | tuple):
        return [described(one) for one in value]
    if isinstance(value, dict):
        return {name: described(one) for name, one in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return str(value)
    return type(value).__name__  # workspaces, quantizers


def tensor(value: Tensor) -> Call:
    """Shape, dtype, strides, whether address and strides are multiples of 16 bytes, and the sum of magnitudes."""
    size = value.element_size()
    outer = [stride * size % 16 == 0 for length, stride in zip(value.shape, value.stride(), strict=True) if stride > 1]
    described = {
        "shape": list(value.shape),
        "dtype": str(value.dtype),
        "stride": list(value.stride()),
        "aligned": value.numel() == 0 or (value.data_ptr() % 16 == 0 and all(outer)),
    }
    if not value.is_floating_point():
        return described | ({"values": value.tolist()} if value.numel() <= 64 else {})
    magnitudes = value.detach().double().abs() if value.dtype.itemsize > 1 else value.detach().float().double().abs()
    return described | {"magnitudes": float(f"{magnitudes.sum().item():.7g}")}


def unwritten(entry: Call) -> Call:
    """The call with what it writes to described but for the numbers, which may be anything before."""

    def forget(value: Any) -> Any:
        if isinstance(value, list):
            return [forget(one) for one in value]
        return {name: one for name, one in value.items() if name != "magnitudes"} if isinstance(value, dict) else value

    args, kwargs = list(entry["args"]), dict(entry["kwargs"])
    if entry["call"] == "te.general_grouped_gemm" and len(args) > 2:
        args[2] = forget(args[2])  # (A, B, out, ...)
    if "out" in kwargs:
        kwargs["out"] = forget(kwargs["out"])
    return entry | {"args": args, "kwargs": kwargs}


class _Operations(TorchDispatchMode):
    """Below autograd, so that the backward pass is seen as well."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in OPERATIONS:
            given = {"args": described(args), "kwargs": described(kwargs or {})}
            self.calls.append({"call": f"aten.{func.overloadpacket.__name__}", **given, "out": described(out)})
        return out


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """The calls of torch's grouped GEMMs and of Transformer Engine's GEMMs inside the ``with`` block, in order."""
    calls: list[Call] = []
    with ExitStack() as undo:
        for name in TE_GEMMS:
            _wrap_everywhere(undo, name, calls)
        undo.enter_context(_Operations(calls))
        yield calls


def _wrap_everywhere(undo: ExitStack, name: str, calls: list[Call]) -> None:
    """In every module of Transformer Engine that imported the function; arguments are described before the call."""
    package = sys.modules.get("transformer_engine.pytorch.cpp_extensions")
    original = getattr(package, name, None)
    if original is None:
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        entry = {"call": f"te.{name}", "args": described(args), "kwargs": described(kwargs)}
        out = original(*args, **kwargs)
        calls.append(unwritten(entry) | {"out": described(out)})
        return out

    for place, module in list(sys.modules.items()):
        if place.partition(".")[0] == "transformer_engine" and vars(module).get(name) is original:
            undo.enter_context(mock.patch.object(module, name, call))


def differences(wanted: Any, got: Any, tolerance: float, path: str = "") -> list[str]:
    """Where two recordings differ, a line each; sums of magnitudes may by ``tolerance``, relatively."""
    if isinstance(wanted, dict) and isinstance(got, dict):
        found = [f"{path}: {sorted(set(wanted) ^ set(got))} only in one"] if set(wanted) != set(got) else []
        for name in sorted(set(wanted) & set(got)):
            found += differences(wanted[name], got[name], tolerance, f"{path}.{name}")
        return found
    if isinstance(wanted, list) and isinstance(got, list) and len(wanted) == len(got):
        pairs = enumerate(zip(wanted, got, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, tolerance, f"{path}[{i}]")]
    if path.endswith(".magnitudes"):
        near = abs(wanted - got) <= tolerance * max(abs(wanted), abs(got))
        return [] if near else [f"{path}: {wanted} and {got}"]
    return [] if wanted == got else [f"{path}: {wanted} and {got}"]
