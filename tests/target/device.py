"""A device that is not there: what the library asks of CUDA is answered by torch's meta device, or by fake tensors.

Tensors have shapes, dtypes and a device, and no numbers.  So a tensor that stayed on the CPU meets others in vain, and
whoever reads a number on the host raises, but for the one read that a plan is allowed, which is answered and counted.
Fake tensors say that they are on cuda:0 and check each operation's devices; autograd has no such device to run on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META, FAKE = torch.device("meta"), torch.device("cuda:0")


@dataclass(frozen=True)
class Layout:
    """How many ranks share the experts, and how many rows the counts of a made-up step say.

    Every rank sends ``rows`` to each expert but the first of each rank, which gets none, and ``pairs`` to each rank.
    """

    experts: int
    expert_ranks: int = 1
    tensor_ranks: int = 1
    rows: int = 3
    pairs: int = 4

    @property
    def local(self) -> int:
        """Experts of a rank."""
        return self.experts // self.expert_ranks

    def host_counts(self) -> list[int]:
        """What :meth:`megatron_dynmoe.routing.PendingPlan.finish` brings to the host in one copy."""
        mine = [0] + [self.rows] * (self.local - 1)
        ranks = self.expert_ranks * self.tensor_ranks
        total_rows, total_pairs = ranks * sum(mine) * self.expert_ranks, ranks * self.pairs * self.expert_ranks
        sent = mine * self.expert_ranks + [self.pairs] * self.expert_ranks
        return [*sent, *mine * ranks, *[self.pairs] * ranks, total_rows, total_pairs]


@dataclass
class Seen:
    """What a pass did: reads of the plan by the host, operations on the device, copies that the host waits for."""

    reads: int = 0
    operations: set[str] = field(default_factory=set)
    copies: list[str] = field(default_factory=list)


class _Record(TorchDispatchMode):
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        tensors = [*given, *(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))]
        kinds = {tensor.device.type for tensor in tensors}
        if kinds - {"cpu"} and func.namespace == "aten":
            self.seen.operations.add(str(func))
            # A host scalar (a tensor of no dimensions) becomes an argument of the kernel; others have to be copied.
            if "cpu" in kinds and any(tensor.device.type == "cpu" and tensor.dim() for tensor in tensors):
                self._copied(func, args, kwargs or {})
        return out

    def _copied(self, func: Any, args: tuple, kwargs: dict) -> None:
        waits = {"_to_copy": not kwargs.get("non_blocking"), "copy_": not (args[2:] and args[2])}
        name = func.overloadpacket.__name__
        if waits.get(name, True):
            self.seen.copies.append(f"{func} {_place(2)}")


def _place(depth: int) -> str:
    """Where in the library, or in Megatron, the operation was asked for."""
    frame: Any = sys._getframe(depth + 1)
    while frame is not None:
        if "/megatron" in frame.f_code.co_filename:
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "in backward"


@contextmanager
def cuda_is(device: torch.device) -> Iterator[None]:
    """Wherever Megatron or the library says CUDA, tensors are made on, or moved to, ``device``.

    ``host.enable()`` must have been called: the device that it redirects to is exchanged.
    """
    from megatron_dynmoe.host import device as host_device

    move = torch.Tensor.to
    with (
        mock.patch.object(host_device, "_CPU", device),
        mock.patch.object(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: move(tensor, device)),
    ):
        yield


@contextmanager
def cuda_is_fake() -> Iterator[None]:
    """CUDA is the device cuda:0 of fake tensors: forward passes only."""

    def moved(module: torch.nn.Module, device: Any = None) -> torch.nn.Module:
        # torch's own exchanges tensors in place, which it cannot with fake ones.
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    there = torch.nn.Parameter(parameter.detach().cuda())
                    there.__dict__.update({key: v for key, v in vars(parameter).items() if key not in vars(there)})
                    part._parameters[name] = there
            part._buffers.update({name: buffer.cuda() for name, buffer in part._buffers.items() if buffer is not None})
        return module

    with FakeTensorMode(), cuda_is(FAKE), mock.patch.object(torch.nn.Module, "cuda", moved):
        yield


@contextmanager
def watched(layout: Layout) -> Iterator[Seen]:
    """Answer the plan's read with the counts of ``layout``; whatever else asks the device for numbers raises."""
    seen, tolist = Seen(), torch.Tensor.tolist

    def answer(tensor: Tensor) -> Any:
        if tensor.device.type == "cpu":
            return tolist(tensor)
        caller = sys._getframe(1).f_code.co_qualname
        assert caller == "PendingPlan.finish", f"{caller} reads numbers of the device"
        seen.reads += 1
        counts = layout.host_counts()
        assert tensor.numel() == len(counts)
        return counts

    def noted(create: Any) -> Any:
        def create_and_note(data: Any, *args: Any, **kwargs: Any) -> Tensor:
            tensor = create(data, *args, **kwargs)
            if tensor.device.type != "cpu" and not isinstance(data, Tensor):
                seen.copies.append(f"torch.{create.__name__} {_place(1)}")  # made on the host, then copied
            return tensor

        return create_and_note

    makers = {name: noted(getattr(torch, name)) for name in ("tensor", "as_tensor")}
    reads = [mock.patch.object(kind, "tolist", answer) for kind in (torch.Tensor, FakeTensor)]
    # Messages of the device that stands for CUDA: torch's fake group has none for it. Nothing is in them anyway.
    messages = mock.patch("torch.distributed.batch_isend_irecv", return_value=[])
    with reads[0], reads[1], messages, mock.patch.multiple(torch, **makers), _Record(seen):
        yield seen


def fake_group(layout: Layout, *, rank: int = 0, ranks: int | None = None, **sizes: int) -> None:
    """Make this process one of many that are not there: collectives return at once, with what is in the buffers."""
    import torch.distributed as dist
    import torch.distributed._tools.fake_collectives  # noqa: F401  (collectives of meta tensors)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ranks = layout.expert_ranks * layout.tensor_ranks if ranks is None else ranks
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    parallel_state.initialize_model_parallel(
        layout.tensor_ranks,
        expert_model_parallel_size=layout.expert_ranks,
        expert_tensor_parallel_size=layout.tensor_ranks,
        create_gloo_process_groups=False,
        **sizes,
    )
    model_parallel_cuda_manual_seed(1)
