"""Weights that are kept in FP8 are saved in the model's dtype, as numbers and not as Transformer Engine's objects."""

import functools
from contextlib import ExitStack
from typing import Any

from megatron_dynmoe.host.replace import replace


def save_numbers(undo: ExitStack) -> None:
    """Take weights of ``--fp8-param-gather`` out of FP8 on their way into a checkpoint, as megatron does when it loads.

    A fault of megatron-core 0.19.2 with Transformer Engine 2.20: tensors are handed to torch as they are, and theirs
    are pickled by a constructor of Transformer Engine's (tensor/float8_tensor.py:1082), also from the CPU. Such a file
    is no plain data, fits no run without these objects, and tells a reader without Transformer Engine nothing.
    megatron's own function for it runs before a load only (dist_checkpointing/serialization.py:143).
    """
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
    from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8

    async_save = TorchDistSaveShardedStrategy.async_save

    @functools.wraps(async_save)
    def async_save_numbers(self: Any, sharded_state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        force_all_tensors_to_non_fp8(sharded_state_dict)
        return async_save(self, sharded_state_dict, *args, **kwargs)

    replace(undo, TorchDistSaveShardedStrategy, async_save=async_save_numbers)
