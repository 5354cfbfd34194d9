"""Values of Megatron's own flags that its parser takes and its loop then fails on, far from the flag."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_dynmoe.config import ConfigError
from megatron_dynmoe.mcore.config import check_balancing

# Iterations are divided by these.
_INTERVALS = ("log_interval", "eval_interval", "tensorboard_log_interval")


def check_args(args: Namespace) -> None:
    """Refuse what cannot work, by flag.

    Args:
        args: parsed, not yet validated by Megatron.

    Raises:
        ConfigError: an interval of less than one iteration, a pattern of MoE layers that is none, a kind of load
            balancing that dynamic layers do not have.
    """
    for name in _INTERVALS:
        value = getattr(args, name)
        if value is not None and value < 1:
            _refuse(name, value, "a whole number of at least 1")
    _check_pattern(args.moe_layer_freq, args.num_layers)
    if args.num_experts is not None:
        check_balancing(args.moe_router_load_balancing_type)


def _check_pattern(freq: Any, layers: int | None) -> None:
    wanted = "a whole number of at least 1, or a list of 0 and 1 with one entry a layer"
    if isinstance(freq, int):
        accepted = freq >= 1
    else:
        accepted = all(type(entry) is int and entry in (0, 1) for entry in freq)
        accepted = accepted and layers in (None, len(freq))
        wanted += "" if layers is None else f" of --num-layers {layers}"
    if not accepted:
        _refuse("moe_layer_freq", freq, wanted)


def _refuse(name: str, value: Any, wanted: str) -> None:
    raise ConfigError(f"--{name.replace('_', '-')} is {value!r}; accepted: {wanted}.")
