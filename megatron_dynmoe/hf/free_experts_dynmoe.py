"""Zero-computation experts of the Hugging Face DynMoE model (MoE++, Jin et al. 2024, arXiv 2410.07348).

Shape letters: `T` tokens of the batch, `D` hidden size, `K` constant experts, `Z` zero-computation experts.
"""

import torch
from torch import nn
from torch.nn import functional as F


class DynMoEFreeExperts(nn.Module):
    """Constant, copy and zero experts, which are columns of the router in this order behind the feed-forward ones.

    Zero: E(x) = 0. Copy: E(x) = x. Constant: E(x) = a1 x + a2 v with [a1, a2] = softmax(W x). Parameters, where there
    are constant experts: `select` [K, 2, D], the W, and `values` [K, D], the v.
    """

    def __init__(self, config):
        super().__init__()
        self.copies, self.constants = config.copy_experts, config.constant_experts
        if self.constants:
            self.select = nn.Parameter(torch.empty(self.constants, 2, config.hidden_size))
            self.values = nn.Parameter(torch.empty(self.constants, config.hidden_size))

    def forward(self, x_TD, weights_TZ):
        """Their sum [T, D], weighted by float32 routing weights; accumulated in float32."""
        share_T1 = weights_TZ[:, self.constants : self.constants + self.copies].sum(dim=-1, keepdim=True)
        if not self.constants:
            return share_T1 * x_TD.float()
        weights_TK = weights_TZ[:, : self.constants]
        # A softmax over two numbers is the sigmoid of their difference.
        a1_TK = F.linear(x_TD, self.select[:, 0] - self.select[:, 1]).float().sigmoid()
        share_T1 = share_T1 + (weights_TK * a1_TK).sum(dim=-1, keepdim=True)
        return share_T1 * x_TD.float() + (weights_TK * (1 - a1_TK)) @ self.values.float()
