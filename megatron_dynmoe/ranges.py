"""The numbers that each field of :class:`megatron_dynmoe.config.DynMoEConfig` accepts.

Every range has two ends: a value that is finite in Python may overflow float32, or fill the memory with columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

MOST = 10**9  # of what is counted
MOST_EXPERTS = 65536  # of one kind in a layer: far above all published models
LARGE = 1e6  # of factors: its square is far from the end of float32
SMALL = 1e-6


class Range(NamedTuple):
    """Numbers from ``least`` to ``most``; ``whole`` ones; without the end itself if it is ``open``; or unset."""

    least: float
    most: float
    whole: bool = False
    open: str = ""  # "least" or "most"
    optional: bool = False

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` is such a number. NaN is none, True and False are none."""
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        inside = self.least <= value <= self.most
        return inside and not (self.open and value == getattr(self, self.open))

    def __str__(self) -> str:
        left, right = "(" if self.open == "least" else "[", ")" if self.open == "most" else "]"
        numbers = f"a {'whole ' if self.whole else ''}number in {left}{self.least:g}, {self.most:g}{right}"
        return numbers + (", or unset" if self.optional else "")


_COEFFICIENT = Range(0, LARGE)
_SCALE = Range(SMALL, LARGE)
_EXPERTS = Range(0, MOST_EXPERTS, whole=True)

RANGES: dict[str, Range] = {
    "top_p": Range(0, 1),
    "topk": Range(1, MOST, whole=True),
    "cosine_scale": Range(SMALL, 100),
    "max_experts_per_token": Range(1, MOST, whole=True, optional=True),
    "max_rows": Range(1, MOST, whole=True, optional=True),
    "max_rows_per_token": Range(1, MOST_EXPERTS, optional=True),
    "load_balance_coeff": _COEFFICIENT,
    "entropy_coeff": _COEFFICIENT,
    "diversity_coeff": _COEFFICIENT,
    "simplicity_coeff": _COEFFICIENT,
    "efficiency_coeff": _COEFFICIENT,
    "z_loss_coeff": _COEFFICIENT._replace(optional=True),
    "input_jitter_eps": Range(0, 1, open="most", optional=True),
    "zero_experts": _EXPERTS,
    "copy_experts": _EXPERTS,
    "constant_experts": _EXPERTS,
    "tau": Range(SMALL, 1),
    "capacity_gamma": _SCALE._replace(optional=True),
    "logits_norm_std": _SCALE._replace(optional=True),
    "expert_input_scale": _SCALE,
    "initial_experts": Range(1, MOST, whole=True, optional=True),
    "record_from": Range(0, MOST, whole=True),
    "update_at": Range(1, MOST, whole=True),
    "update_period": Range(0, MOST, whole=True),
    "max_added_experts": Range(1, MOST, whole=True),
    "fp8_margin": Range(-64, 64, whole=True),
    "fp8_amax_history_len": Range(1, 1 << 20, whole=True),
}
