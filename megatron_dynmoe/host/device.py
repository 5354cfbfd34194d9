"""The claim that there is a device, made to megatron alone, and placement: CUDA as the place of a tensor is the CPU."""

import functools
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_dynmoe.host.replace import replace

_CPU = torch.device("cpu")
QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"


def _asked_by_megatron() -> bool:
    """Whether whoever called the caller of this function is in megatron (``megatron_dynmoe`` is not)."""
    module = sys._getframe(2).f_globals.get("__name__", "")
    return module.partition(".")[0] == "megatron"


def redirect_device(undo: ExitStack) -> None:
    replace(
        undo,
        torch.cuda,
        is_available=lambda: _asked_by_megatron(),  # the lambda is the caller that _asked_by_megatron speaks of
        device_count=lambda: int(_asked_by_megatron()),
        current_device=lambda: 0,
        set_device=lambda device: None,
        # Argument checks read the architecture: those of Hopper, which is trained on, are to be heard here as well.
        get_device_properties=lambda device=None: SimpleNamespace(name="cpu", major=9, minor=0),
        get_device_capability=lambda device=None: (9, 0),
    )
    if QUEUES not in os.environ:
        claim_queues(one=True)
        undo.callback(os.environ.pop, QUEUES, None)


def claim_queues(*, one: bool) -> None:
    """What checks of arguments want for Hopper: one queue beside tensor and context parallelism, several beside FSDP.

    It says nothing to a CPU.
    """
    if one:
        os.environ.setdefault(QUEUES, "1")
    else:
        os.environ.pop(QUEUES, None)


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return type(device) is int


def _on_cpu(create: Callable[..., Any]) -> Callable[..., Any]:
    """``create``, a function that takes a device, but for CUDA as the device."""

    @functools.wraps(create)
    def create_on_cpu(*args: Any, **kwargs: Any) -> Any:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return create(*args, **kwargs)

    return create_on_cpu


def redirect_placement(undo: ExitStack) -> None:
    # torch's own list of what takes a device; this call caches it, so `with torch.device(...)` knows the originals.
    listed = {create.__name__: create for create in _device_constructors()}
    names = [name for name, create in listed.items() if getattr(torch, name, None) is create]
    likes = [name for name in dir(torch) if name.endswith("_like")]
    replace(undo, torch, **{name: _on_cpu(getattr(torch, name)) for name in (*names, *likes)})

    news = [name for name in dir(torch.Tensor) if name.startswith("new_")]
    to, kind = _on_cpu(torch.Tensor.to), torch.Tensor.type

    def to_device_or_dtype(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _names_cuda(args[0]):
            args = (_CPU, *args[1:])
        return to(tensor, *args, **kwargs)

    def kind_of_tensor(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = kind(tensor, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.", 1) if isinstance(name, str) and _asked_by_megatron() else name

    replace(
        undo,
        torch.Tensor,
        **{name: _on_cpu(getattr(torch.Tensor, name)) for name in news},
        to=to_device_or_dtype,
        cuda=lambda tensor, *args, **kwargs: tensor,
        pin_memory=lambda tensor, *args, **kwargs: tensor,
        record_stream=lambda tensor, stream: None,
        type=kind_of_tensor,
        is_cuda=property(lambda tensor: _asked_by_megatron()),
    )
