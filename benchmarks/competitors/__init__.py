"""The ways to run the routed part of an MoE layer that ``bench_moe_layer.py`` sets side by side; one a file.

Each gets the same :class:`~benchmarks.competitors.case.Case` (inputs, routing map, routing weights, expert weights) and
does all that lies between the router and the sum over a token's experts, forward and backward.
"""

from __future__ import annotations

from importlib import import_module

from benchmarks.competitors.case import Case
from benchmarks.competitors.method import Method

FLOOR, PRODUCTS = "floor", "products"

# Name to module and class. Modules are imported when they are asked for: one of them imports megatron-core.
METHODS = {
    "dynmoe-expert": ("dynmoe", "PerExpert"),
    "dynmoe-rank": ("dynmoe", "PerRank"),
    "megatron": ("megatron_core", "StockDispatcher"),
    "megatron-sequential": ("megatron_core", "StockLayer"),
    "loop": ("loop", "LoopOverExperts"),
    "dense": ("dense", "DenseDispatch"),
    FLOOR: ("floor", "Floor"),
    PRODUCTS: ("floor", "OwnProducts"),
}


def module_of(name: str) -> str:
    """The module that holds the method ``name``."""
    return f"{__name__}.{METHODS[name][0]}"


def build(name: str, case: Case) -> Method:
    """The method ``name`` over one case.

    Raises:
        NotPossible: the method cannot run this case; the message says why.
    """
    method = getattr(import_module(module_of(name)), METHODS[name][1])(case)
    method.name = name
    return method
