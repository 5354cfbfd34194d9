"""Ranges of numbers that settings accept.

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


COEFFICIENT = Range(0, LARGE)
SCALE = Range(SMALL, LARGE)
EXPERTS = Range(0, MOST_EXPERTS, whole=True)
COUNT = Range(1, MOST, whole=True)
