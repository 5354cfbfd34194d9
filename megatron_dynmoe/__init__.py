"""Mixture-of-experts layers for Megatron in which each token chooses how many experts it uses.

The names below are looked up on first use: importing the package imports neither torch nor megatron.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> the module of this package that has it.
_HOME = {
    "ConfigError": "config",
    "DynMoEConfig": "config",
    "Routing": "routers.routing",
    "RoutePlan": "routing",
    "route": "routers",
    "register_gate": "routers",
    "register_rule": "routers",
    "DynamicRouter": "mcore.router",
    "DynMoELayer": "mcore.layer",
    "dynamic_layer_spec": "mcore.specs",
    "host": "host",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        known = ", ".join(_HOME)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {known}")
    module = import_module(f"{__name__}.{_HOME[name]}")
    value = module if name == _HOME[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
