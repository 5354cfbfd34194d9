"""Random numbers: the CUDA generator is the CPU's."""

import functools
import logging
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils.data import dataloader as torch_dataloader

from megatron_dynmoe.host.replace import replace


def _is_not_rng_warning(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in str(record.msg)


def redirect_generators(undo: ExitStack) -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    for owner in (torch.cuda, torch.cuda.random):
        replace(
            undo,
            owner,
            get_rng_state=lambda device=None: torch.get_rng_state(),
            set_rng_state=lambda new_state, device=None: torch.set_rng_state(new_state),
            manual_seed=lambda seed: torch.default_generator.manual_seed(int(seed)),
        )
    replace(undo, torch.cuda, default_generators=(torch.default_generator,))
    # Megatron sets a state through torch's queue of calls that wait until CUDA starts, which here would be forever.
    replace(undo, megatron_random, _lazy_call=lambda call, **_: call())

    logger = logging.getLogger(megatron_random.__name__)
    logger.addFilter(_is_not_rng_warning)
    undo.callback(logger.removeFilter, _is_not_rng_warning)

    iterator = torch_dataloader._BaseDataLoaderIter
    make_iterator = iterator.__init__

    @functools.wraps(make_iterator)
    def make_without_drawing(self: Any, loader: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            make_iterator(self, loader)

    replace(undo, iterator, __init__=make_without_drawing)
