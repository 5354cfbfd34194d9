"""Zero-computation experts of MoE++: zero, copy and constant, on every rank, without a row in the plan.

Jin et al. 2024, arXiv 2410.07348, eq. 3-6.  Columns beside those of the FFN experts, in this order: constant, copy,
zero (that of the public code).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear


def zero_computation(x_TD: Tensor, weights_TZ: Tensor, select_C2D: Tensor, values_CD: Tensor, *, copies: int) -> Tensor:
    """sum_z weight_z E_z(x) as one expression over T x D: no gather, no scatter, no loop over experts.

    Zero: E(x) = 0.  Copy: E(x) = x.  Constant: E(x) = a_1 x + a_2 v with [a_1, a_2] = softmax(W x).  Over two numbers
    the softmax is a sigmoid of their difference, so

        out = (sum_copies g + sum_constants g a_1) x + (g a_2) V.

    Args:
        x_TD: the experts' input.
        weights_TZ: float32 routing weights, 0 where not chosen.
        select_C2D: W of each constant expert.
        values_CD: v of each constant expert.
        copies: copy experts; what is left of the columns are zero experts.

    Returns:
        [T, D] in the dtype of ``x_TD``, a tensor of its own that the caller may add to in place.
    """
    constants = values_CD.shape[0]
    weights_TC = weights_TZ[:, :constants]
    share_T = weights_TZ[:, constants : constants + copies].sum(dim=-1)
    if constants == 0:
        return share_T.to(x_TD.dtype).unsqueeze(-1) * x_TD
    first_TC = linear(x_TD, (select_C2D[:, 0] - select_C2D[:, 1]).to(x_TD.dtype)).to(weights_TC.dtype).sigmoid()
    share_T = share_T + (weights_TC * first_TC).sum(dim=-1)
    constant_TD = (weights_TC * (1 - first_TC)).to(x_TD.dtype) @ values_CD.to(x_TD.dtype)
    # In place: beside few FFN rows, a fresh T x D tensor is what takes the time.
    return constant_TD.addcmul_(share_T.to(x_TD.dtype).unsqueeze(-1), x_TD)
