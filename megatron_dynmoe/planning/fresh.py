"""How many experts a token visits when routers are new, which is when memory is at its fullest.

A new router is flat: its logits are so small that all experts are about as probable, and a rule that collects
probability takes many of them.  Training makes them few.  A norm stands before the router, so its input has length
sqrt(D), and weights of standard deviation s make each logit an independent normal number of deviation s sqrt(D).
That is all a rule sees, so k at the start is a mean over such draws, of any model's width, without a model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from megatron_dynmoe.planning.shapes import TANH_UNITS, Model

TOKENS = 2000  # the mean of k is then within a few thousandths
SEED = 0


def fresh_k(model: Model) -> float:
    """Mean FFN experts a token visits at the start of training."""
    return _bounded(model, active=model.routing.initial_experts or model.experts)


def fullest_k(model: Model) -> float:
    """The most over training that can be said beforehand: with an adaptive number of experts all slots may fill."""
    return _bounded(model, active=model.experts)


def _bounded(model: Model, *, active: int) -> float:
    routing, tokens = model.routing, model.sequence * model.micro_batch
    columns = active + routing.zero_computation_experts
    cap = routing.max_experts_per_token or columns
    dice, count = random.Random(SEED), _counter(model)
    if routing.rule == "top-k":  # the same for every token
        chosen = float(min(routing.topk, cap, columns))
    else:
        chosen = sum(min(count(dice, columns), cap) for _ in range(TOKENS)) / TOKENS
    mean = chosen * active / columns  # columns are alike, so FFN experts get their share
    if routing.max_rows_per_token is not None:
        mean = min(mean, max(routing.max_rows_per_token, 1.0))
    if routing.max_rows is not None:
        mean = min(mean, max(routing.max_rows / tokens, 1.0))
    return mean


def _counter(model: Model) -> Callable[[random.Random, int], int]:
    """How many columns one token chooses, by gate and rule."""
    routing = model.routing
    deviation = model.init_std * math.sqrt(model.width)
    if routing.gate == "tanh":  # the outputs of a layer of H tanh units; tanh(z)^2 is at most z^2
        deviation = model.init_std * math.sqrt(TANH_UNITS * model.columns) * min(deviation, 1.0)
    if routing.gate == "cosine":  # between a random direction and another one
        deviation = routing.cosine_scale / math.sqrt(model.width)

    def top_any(dice: random.Random, columns: int) -> int:
        return sum(dice.gauss(0, deviation) > 0 for _ in range(columns))  # thresholds begin at 0

    def top_p(dice: random.Random, columns: int) -> int:
        logits = [dice.gauss(0, deviation) for _ in range(columns)]
        scores = [1 / (1 + math.exp(-z)) if routing.gate == "cosine" else math.exp(z) for z in logits]
        wanted = routing.top_p * (1.0 if routing.gate == "cosine" else sum(scores))
        before, count = 0.0, 0
        for score in sorted(scores, reverse=True):
            if count and before > wanted:
                break
            before, count = before + score, count + 1
        return count

    return top_any if routing.rule == "top-any" else top_p
