"""What Megatron's sums say of the last log interval alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class IntervalSums:
    """Takes out of Megatron's running sums what was reported before.

    Megatron reports the first iteration of a run and resets nothing then (training.py:2594).  Where that iteration ends
    a log interval, the next interval's sums, and its clock, hold it once more.
    """

    def __init__(self) -> None:
        self._first = True
        self._reported: dict[str, float] = {}

    def of(self, sums: Mapping[str, Any], iterations: int) -> dict[str, float]:
        """The sums over the interval.

        Args:
            sums: Megatron's, numbers or tensors of one element.
            iterations: how many the interval has.
        """
        numbers = {name: float(value) for name, value in sums.items()}
        own = {name: value - self._reported.get(name, 0.0) for name, value in numbers.items()}
        self._reported = numbers if self._first and iterations == 1 else {}
        self._first = False
        return own
