"""A plain top-2 layer and MoE++ on equal terms: tensors, maps with exact counts, and the passes that are timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Numbers that define a case.

    Attributes:
        tokens: T. width: D. expert_width: F.
        ffn, free: N_FFN and N_ZC; of the latter one is a zero expert, one a copy expert, the rest are constant.
        tau: share of the balance loss.
    """

    tokens: int
    width: int
    expert_width: int
    ffn: int
    free: int
    tau: float

    @property
    def predicted(self) -> float:
        """Time of the plain layer / time of MoE++, if only FFN experts took time."""
        return (self.tau * self.ffn + self.free) / (self.tau * self.ffn)

    @property
    def ffn_rows(self) -> int:
        """Assignments to FFN experts, of 2 T."""
        return round(2 * self.tokens / self.predicted)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Tensors of a setting; shape letters as in ``megatron_dynmoe/routing.py``.

    Attributes:
        plain_map_TE, plain_weights_TE: routing of the plain layer.
        map_TC, weights_TC: of MoE++, whose columns are FFN experts, constant, copy, zero.
        select_C2D, values_CD: the constant experts' W and v.
        ready_ND, inner_NF: 2 T rows for the GEMMs alone.
    """

    x_TD: Tensor
    grad_TD: Tensor
    plain_map_TE: Tensor
    plain_weights_TE: Tensor
    map_TC: Tensor
    weights_TC: Tensor
    fc1_EGD: Tensor
    fc2_EDF: Tensor
    select_C2D: Tensor
    values_CD: Tensor
    ready_ND: Tensor
    inner_NF: Tensor

    @classmethod
    def make(cls, setting: Setting, device: str, dtype: torch.dtype) -> Case:
        """The same numbers for the same setting."""
        import torch

        generator = torch.Generator().manual_seed(1000)
        tokens, width, inner = setting.tokens, setting.width, setting.expert_width
        ffn, constants = setting.ffn, setting.free - 2

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(device, dtype).requires_grad_()

        def routing(counts: list[int]) -> tuple[Tensor, Tensor]:
            chosen = draw_map(counts, generator)
            weights = torch.where(chosen, 0.1 + torch.rand(chosen.shape, generator=generator), 0.0)
            return chosen.to(device), weights.to(device).requires_grad_()

        plain = routing(evenly(2 * tokens, ffn))
        mixed = routing(evenly(setting.ffn_rows, ffn) + evenly(2 * tokens - setting.ffn_rows, setting.free))
        return cls(
            x_TD=normal(tokens, width),
            grad_TD=normal(tokens, width).detach(),
            plain_map_TE=plain[0],
            plain_weights_TE=plain[1],
            map_TC=mixed[0],
            weights_TC=mixed[1],
            fc1_EGD=normal(ffn, 2 * inner, width, scale=width**-0.5),
            fc2_EDF=normal(ffn, width, inner, scale=inner**-0.5),
            select_C2D=normal(constants, 2, width, scale=width**-0.5),
            values_CD=normal(constants, width),
            ready_ND=normal(2 * tokens, width),
            inner_NF=normal(2 * tokens, inner),
        )

    def clear(self) -> None:
        """Drop all gradients."""
        for value in vars(self).values():
            value.grad = None


def evenly(total: int, parts: int) -> list[int]:
    """``total`` as ``parts`` counts that differ by one at most."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def draw_map(counts: list[int], generator: torch.Generator) -> Tensor:
    """bool [T, len(counts)]: two experts for each token, ``counts[e]`` tokens for expert e, drawn at random.

    The assignments are shuffled and dealt in pairs. Where a token got the same expert twice, second members change
    places with those of as many random tokens until nobody has, so the counts stay what they are.

    Raises:
        ValueError: the counts do not sum to two a token, or one expert has more than a third of them. (Up to a half is
            possible, but then such a deal hardly ever comes out.)
    """
    import torch

    tokens, odd = divmod(sum(counts), 2)
    if odd or 3 * max(counts) > 2 * tokens + 2:
        raise ValueError(f"counts are {counts}; accepted: an even sum, and at most a third of it for one expert.")
    dealt = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    pair_T2 = dealt[torch.randperm(2 * tokens, generator=generator)].view(tokens, 2)
    while len(twice := (pair_T2[:, 0] == pair_T2[:, 1]).nonzero().view(-1)):
        partners = torch.randperm(tokens, generator=generator)[: len(twice) + 1]
        changing = torch.cat([twice, partners]).unique()
        shuffled = changing[torch.randperm(len(changing), generator=generator)]
        pair_T2[changing, 1] = pair_T2[shuffled, 1]
    return torch.zeros(tokens, len(counts), dtype=torch.bool).scatter_(1, pair_T2, True)


def ffn_part(
    x_TD: Tensor, map_TE: Tensor, weights_TE: Tensor, case: Case, local: Callable[[], Tensor] | None = None
) -> Tensor:
    """The FFN experts as the library computes them on one rank, planning included; ``local`` when rows would travel."""
    from megatron_dynmoe.dispatch import combine, dispatch
    from megatron_dynmoe.experts import grouped_mlp
    from megatron_dynmoe.routing import RoutePlan

    plan = RoutePlan.build(map_TE)
    rows, weights, transport = dispatch(x_TD, weights_TE, plan)
    onto_TD = None if local is None else local()
    out = grouped_mlp(rows, weights, case.fc1_EGD, case.fc2_EDF, plan.rows_L)
    return combine(out, transport, len(x_TD), onto_TD)


def plain(case: Case) -> Tensor:
    """The plain layer."""
    return ffn_part(case.x_TD, case.plain_map_TE, case.plain_weights_TE, case)


def moe_plus_plus(case: Case) -> Tensor:
    """The layer with zero-computation experts."""
    ffn = len(case.fc1_EGD)
    return ffn_part(case.x_TD, case.map_TC[:, :ffn], case.weights_TC[:, :ffn], case, lambda: fused(case))


def fused(case: Case) -> Tensor:
    """The zero-computation experts alone, as the library computes them."""
    from megatron_dynmoe.experts import zero_computation

    weights_TZ = case.weights_TC[:, len(case.fc1_EGD) :]
    return zero_computation(case.x_TD, weights_TZ, case.select_C2D, case.values_CD, copies=1)


def loop(case: Case) -> Tensor:
    """The same, one expert after another: find its tokens, gather them, compute, index_add the weighted result."""
    import torch
    import torch.nn.functional as F

    ffn, constants = len(case.fc1_EGD), len(case.values_CD)
    out_TD = torch.zeros_like(case.x_TD)
    for column in range(ffn, case.map_TC.shape[1]):
        (token_M,) = torch.where(case.map_TC[:, column])
        rows_MD, expert = case.x_TD.index_select(0, token_M), column - ffn
        if expert < constants:
            mix_M2 = F.linear(rows_MD, case.select_C2D[expert]).softmax(dim=-1)
            y_MD = mix_M2[:, :1] * rows_MD + mix_M2[:, 1:] * case.values_CD[expert]
        else:
            y_MD = rows_MD if expert == constants else torch.zeros_like(rows_MD)
        y_MD = y_MD * case.weights_TC[token_M, column].unsqueeze(-1)
        out_TD.index_add_(0, token_M, y_MD.to(out_TD.dtype))
    return out_TD


def gemms(case: Case, map_TE: Tensor) -> Tensor:
    """The two grouped GEMMs for a map's rows: no plan, no activation, no moves."""
    import torch.nn.functional as F

    ends_E = map_TE.sum(dim=0).cumsum(0).int()
    rows = int(ends_E[-1])
    F.grouped_mm(case.ready_ND[:rows], case.fc1_EGD.transpose(1, 2), offs=ends_E)
    return F.grouped_mm(case.inner_NF[:rows], case.fc2_EDF.transpose(1, 2), offs=ends_E)


METHODS: dict[str, Callable[[Case], Tensor]] = {
    "plain": plain,
    "moe++": moe_plus_plus,
    "fused": fused,
    "loop": loop,
}
FORWARD_ONLY: dict[str, Callable[[Case], Tensor]] = {
    "plain_gemms": lambda case: gemms(case, case.plain_map_TE),
    "moe++_gemms": lambda case: gemms(case, case.map_TC[:, : len(case.fc1_EGD)]),
}
