"""What each token of a text costs: the FFN experts that it used in each MoE layer, and its zero-computation experts.

Works on tensors, arrays and nested lists alike, and imports none of the libraries that make them.
Shape letters: ``T`` tokens of the text, ``E`` FFN experts of a layer, ``Z`` zero-computation experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megatron_dynmoe.report.token_text import Token

KINDS = ("constant", "copy", "zero")  # in the order of the columns of a map of zero-computation experts


@dataclass(frozen=True)
class LayerCosts:
    """The routing of one MoE layer.

    Attributes:
        layer: index in the model, from 0; dense layers count.
        experts: FFN experts that it has.
        visited: FFN experts of each token [T].
        kinds: zero-computation experts of each token [T], by kind; only the kinds that the layer has.
    """

    layer: int
    experts: int
    visited: tuple[int, ...]
    kinds: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """FFN experts per token."""
        return sum(self.visited) / len(self.visited)

    def kind_shares(self) -> dict[str, float]:
        """Share of each kind of zero-computation expert in the (token, expert) pairs, those of FFN experts included."""
        sums = {kind: sum(counts) for kind, counts in self.kinds.items()}
        pairs = sum(self.visited) + sum(sums.values())
        return {kind: count / pairs if pairs else 0.0 for kind, count in sums.items()}


@dataclass(frozen=True)
class EntryCost:
    """An entry of the vocabulary: the first ``token`` of its ``count`` occurrences, and their ``mean`` FFN experts."""

    token: Token
    count: int
    mean: float


@dataclass(frozen=True)
class TokenCosts:
    """The tokens of a text and what each costs; at least one token and one MoE layer."""

    tokens: tuple[Token, ...]
    layers: tuple[LayerCosts, ...]

    @cached_property
    def means(self) -> tuple[float, ...]:
        """FFN experts of each token [T], mean over the MoE layers."""
        counts = zip(*(layer.visited for layer in self.layers), strict=True)
        return tuple(sum(of_token) / len(self.layers) for of_token in counts)

    @property
    def mean(self) -> float:
        """FFN experts per token and MoE layer."""
        return sum(layer.mean for layer in self.layers) / len(self.layers)

    @property
    def share(self) -> float:
        """Share of all FFN experts that a token uses."""
        return sum(layer.mean for layer in self.layers) / sum(layer.experts for layer in self.layers)

    @property
    def idle_experts(self) -> float:
        """FFN experts of all layers together that a token does not use, mean over tokens."""
        return sum(layer.experts - layer.mean for layer in self.layers)

    def entries(self) -> list[EntryCost]:
        """Each entry of the vocabulary that occurs, the cheapest first; the more frequent first among equals."""
        places: dict[int, list[int]] = {}
        for place, token in enumerate(self.tokens):
            places.setdefault(token.id, []).append(place)
        found = [
            EntryCost(self.tokens[at[0]], len(at), sum(self.means[place] for place in at) / len(at))
            for at in places.values()
        ]
        return sorted(found, key=lambda entry: (entry.mean, -entry.count, entry.token.id))


def token_costs(
    tokens: Sequence[Token],
    maps: Sequence[Any],
    *,
    layers: Sequence[int] | None = None,
    maps_TZ: Sequence[Any] | None = None,
    experts_of_kind: Mapping[str, int] | None = None,
) -> TokenCosts:
    """Counts what the routing maps of a text say.

    Args:
        tokens: of the text [T].
        maps: for each MoE layer which FFN experts a token uses [T, E] (bool, or 0 and 1).
        layers: indices of those layers in the model; 0, 1, ... if not given.
        maps_TZ: for each MoE layer which zero-computation experts a token uses [T, Z]: constant, copy, zero.
        experts_of_kind: experts of each of :data:`KINDS` in a layer; they add up to Z.

    Raises:
        ValueError: no token or layer, or a map whose size does not fit.
    """
    if not tokens or not maps:
        raise ValueError(f"there are {len(tokens)} tokens and {len(maps)} MoE layers; one of each is the least.")
    indices = range(len(maps)) if layers is None else layers
    others: Sequence[Any] = [None] * len(maps) if maps_TZ is None else maps_TZ
    if not len(indices) == len(others) == len(maps):
        raise ValueError(
            f"{len(maps)} maps are of {len(indices)} layers, {len(others)} of which have zero-computation experts."
        )
    found = []
    for index, map_TE, map_TZ in zip(indices, maps, others, strict=True):
        if len(map_TE) != len(tokens):
            raise ValueError(f"the map of layer {index} has {len(map_TE)} rows for {len(tokens)} tokens.")
        kinds = {} if map_TZ is None else _kind_counts(map_TZ, experts_of_kind or {}, layer=index, tokens=len(tokens))
        found.append(LayerCosts(index, experts=len(map_TE[0]), visited=_row_sums(map_TE), kinds=kinds))
    return TokenCosts(tuple(tokens), tuple(found))


def _kind_counts(map_TZ: Any, experts: Mapping[str, int], *, layer: int, tokens: int) -> dict[str, tuple[int, ...]]:
    width = sum(experts.get(kind, 0) for kind in KINDS)
    if len(map_TZ) != tokens or len(map_TZ[0]) != width:
        raise ValueError(
            f"the map of the zero-computation experts of layer {layer} is {len(map_TZ)} by {len(map_TZ[0])}; it must "
            f"be {tokens} tokens by {width} experts."
        )
    rows = _nested(map_TZ)
    counts, first = {}, 0
    for kind in KINDS:
        last = first + experts.get(kind, 0)
        if last > first:
            counts[kind] = tuple(int(sum(row[first:last])) for row in rows)
        first = last
    return counts


def _row_sums(rows: Any) -> tuple[int, ...]:
    """Tensors and arrays count by themselves: with 64 experts a loop over Python numbers takes minutes for a book."""
    if hasattr(rows, "sum"):
        return tuple(int(count) for count in rows.sum(-1).tolist())
    return tuple(int(sum(row)) for row in rows)


def _nested(rows: Any) -> list[list[int]]:
    return rows.tolist() if hasattr(rows, "tolist") else rows
