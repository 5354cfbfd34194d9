"""Routers: a gate turns hidden states into scores, a rule turns scores into a map and weights.

Each gate and each rule is one file of this folder and registers itself by name; the names are what
``--moe-gate`` and ``--moe-rule`` accept.  To add one, write the file, register it, and import it below.
The order of the imports is the order in which ``--help`` lists gates, rules and presets.
"""

from megatron_dynmoe.routers.registry import GATES, PRESETS, RULES, register_gate, register_preset, register_rule  # isort: skip
from megatron_dynmoe.routers import softmax, sigmoid, tanh, cosine  # noqa: F401  (imported to register)  # isort: skip
from megatron_dynmoe.routers import top_p, top_k, top_any, threshold  # noqa: F401  # isort: skip
from megatron_dynmoe.routers.route import finish_weights, route

__all__ = ["GATES", "PRESETS", "RULES", "finish_weights", "register_gate", "register_preset", "register_rule", "route"]
