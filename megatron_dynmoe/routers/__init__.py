"""Routers: a gate turns hidden states into scores, a rule turns scores into a map and weights.

Each gate and each rule is one file of this folder and registers itself by name; the names are what
``--moe-gate`` and ``--moe-rule`` accept.  To add one, write the file, register it, and import it below.
"""

from megatron_dynmoe.routers.registry import GATES, RULES, register_gate, register_rule  # isort: skip
from megatron_dynmoe.routers import cosine, softmax, tanh, top_any, top_k, top_p  # noqa: F401  (imported to register)
from megatron_dynmoe.routers.route import finish_weights, route

__all__ = ["GATES", "RULES", "finish_weights", "register_gate", "register_rule", "route"]
