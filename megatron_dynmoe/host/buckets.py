"""Which buckets of parameters and gradients megatron sends together."""

import functools
from contextlib import ExitStack
from typing import Any

from megatron_dynmoe.host.replace import replace


def redirect_buckets(undo: ExitStack) -> None:
    """Let each group of buckets have one dtype.

    Megatron puts all buckets of a model chunk without bucketing, as those of an interleaved pipeline are, into one
    group and gathers them in one coalesced call (param_and_grad_buffer.py:1707 of 0.19.2).  NCCL takes tensors of any
    dtypes there.  Gloo in torch 2.13 copies them through one buffer: with a float32 router beside bfloat16 weights it
    returns wrong numbers and no error.
    """
    from megatron.core.distributed import distributed_data_parallel

    partition = distributed_data_parallel.partition_buckets

    @functools.wraps(partition)
    def partition_by_dtype(buffers: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        alike: dict[tuple, list[Any]] = {}
        for buffer in buffers:
            alike.setdefault((buffer.param_dtype, buffer.grad_dtype), []).append(buffer)
        return [group for some in alike.values() for group in partition(some, *args, **kwargs)]

    replace(undo, distributed_data_parallel, partition_buckets=partition_by_dtype)
