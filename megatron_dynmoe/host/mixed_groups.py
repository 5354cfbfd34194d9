"""Float32 parameters beside 16-bit ones in one optimizer group, as a gate that stays float32 makes them."""

import functools
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch

from megatron_dynmoe.host.replace import replace


def mend_mixed_groups(undo: ExitStack) -> None:
    """Let megatron's mixed-precision optimizers save and load groups of two dtypes; groups of one they treat as ever.

    Three faults of megatron-core 0.19.2, with and without CUDA.  In megatron/core/optimizer/distrib_optimizer.py a
    group's parameters are numbered as they lie in the buffers (329), but its main parameters are kept float32 first
    (487), so that whoever looks one up by number (990, 1097, 1199, 2237) gets another's; and two of the formats load
    into float32 parameters without ``no_grad`` (2061, 2254).  In optimizer.py the plain optimizer counts its
    parameters when it saves, but only the 16-bit ones (1143).
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    build_ranges = DistributedOptimizer._build_optimizer_group_ranges.__func__
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    sharded_state_dict = Float16OptimizerWithFloat16Params.sharded_state_dict

    @functools.wraps(build_ranges)
    def build_float32_first(cls: type, param_groups: list, gbuf_ranges: list) -> tuple[dict, list]:
        number, ranges = build_ranges(cls, param_groups, gbuf_ranges)
        for group, group_range in enumerate(ranges):
            group_range["params"].sort(key=lambda parameter: parameter.dtype != torch.float32)
            number |= {parameter: (group, order) for order, parameter in enumerate(group_range["params"])}
        return number, ranges

    @functools.wraps(sharded_state_dict)
    def sharded_state_dict_of_all(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        copies = zip(self.fp32_from_float16_groups, self.float16_groups, strict=True)
        pairs = chain.from_iterable(zip(*groups, strict=True) for groups in copies)
        model_of = {id(main): model for main, model in pairs}
        mains = [group["params"] for group in self.optimizer.param_groups]
        with ExitStack() as put_back:
            models = [[model_of.get(id(main), main) for main in group] for group in mains]
            replace(put_back, self, float16_groups=models, fp32_from_float16_groups=mains)
            state = sharded_state_dict(self, *args, **kwargs)
        state["fp32_from_fp16_params"] = [  # a float32 parameter is no copy
            [entry for entry, main in zip(entries, group, strict=True) if id(main) in model_of]
            for entries, group in zip(state["fp32_from_fp16_params"], mains, strict=True)
        ]
        return state

    replace(
        undo,
        DistributedOptimizer,
        _build_optimizer_group_ranges=classmethod(build_float32_first),
        _set_main_param_and_optimizer_states=torch.no_grad()(set_states),
    )
    replace(undo, Float16OptimizerWithFloat16Params, sharded_state_dict=sharded_state_dict_of_all)
