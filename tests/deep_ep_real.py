"""The real DeepEP or HybridEP beside its stand-in, and under a layer: ``torchrun ... -m tests.deep_ep_real deepep``.

On a machine without them the same lines run with the stand-in in both places (tests/mcore/test_flex_real.py).
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from tests import deep_ep_standin, flex_ranks

T, D, LOCAL, K = 96, 256, 4, 6


def case(ragged: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [T, D] bfloat16 of this rank, and where its tokens go [T, E]; half of them nowhere if ragged."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    experts = LOCAL * dist.get_world_size()
    x_TD = torch.randn(T, D, generator=generator).bfloat16()
    scores = torch.rand(T, experts, generator=generator)
    map_TE = scores >= scores.topk(min(K, experts)).values[:, -1:]
    if ragged:
        map_TE &= torch.rand(T, experts, generator=generator) < 0.4
        map_TE[::2] = False
    return x_TD, map_TE


def choices(map_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [T, K] with -1 for no choice, and float32 weights."""
    weights_TE = torch.rand(map_TE.shape, generator=torch.Generator().manual_seed(5)).masked_fill(~map_TE, -1)
    best, indices = weights_TE.topk(min(K, map_TE.shape[1]), dim=-1)
    return indices.masked_fill(best < 0, -1), best.clamp_min(0)


Answers = tuple[list[torch.Tensor], list[torch.Tensor]]


def deepep(buffer: Any, device: str, x_TD: torch.Tensor, map_TE: torch.Tensor) -> Answers:
    """What megatron-core asks of a Buffer in a forward and a backward pass: what is moved, and what is summed."""
    indices, weights = (tensor.to(device) for tensor in choices(map_TE))
    x = x_TD.to(device)
    per_rank, per_node, per_expert, visits, _ = buffer.get_dispatch_layout(indices, map_TE.shape[1])
    rows, index, weight, counts, handle, _ = buffer.dispatch(
        x,
        topk_idx=indices,
        topk_weights=weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=visits,
        num_tokens_per_expert=per_expert,
    )
    combined, combined_weights, _ = buffer.combine(rows, handle, topk_weights=weight)
    again = buffer.dispatch(x, handle=handle)[0]
    moved = [per_rank, per_expert, visits, rows, index, weight, torch.tensor(counts), combined_weights, again]
    return moved, [combined]


def hybridep(buffer: Any, device: str, x_TD: torch.Tensor, map_TE: torch.Tensor) -> Answers:
    """The same of a HybridEPBuffer, with and without groups in multiples."""
    x, map_TE = x_TD.to(device), map_TE.to(device)
    probs = torch.rand(map_TE.shape, generator=torch.Generator().manual_seed(5)).to(device) * map_TE
    moved, summed = [], []
    for multiple in (None, 16):
        rows, weights, _, counts, handle = buffer.dispatch_with_permute(
            hidden=x, routing_map=map_TE, probs=probs, num_of_experts_per_rank=LOCAL, pad_multiple=multiple
        )
        combined, back = buffer.combine_with_unpermute(hidden=rows, probs=weights, handle=handle, pad_multiple=multiple)
        again = buffer.dispatch_with_permute(
            hidden=x, handle=handle, pad_multiple=multiple, num_permuted_tokens=counts.sum()
        )[0]
        if multiple is not None:  # what fills up is written by nobody; its weight alone matters
            filled = weights != 0
            rows, again, weights = rows[filled], again[filled], weights[filled]
        moved += [rows, weights, counts.long(), back, again]
        summed.append(combined)
    return moved, summed


def contract(real: ModuleType, backend: str, device: str, plain: dist.ProcessGroup) -> None:
    """The real library and the stand-in answer alike: bit for bit what is moved."""
    from megatron.core.transformer.moe.fused_a2a import get_buffer

    for ragged in (False, True):
        x_TD, map_TE = case(ragged)
        if backend == "deepep":
            theirs = deepep(get_buffer(dist.group.WORLD, 2 * D), device, x_TD, map_TE)
            ours = deepep(deep_ep_standin.Buffer(plain), "cpu", x_TD, map_TE)
        else:
            arguments = {"hidden_dim": D, "max_num_of_tokens_per_rank": T, "num_local_experts": LOCAL}
            theirs = hybridep(real.HybridEPBuffer(group=dist.group.WORLD, **arguments), device, x_TD, map_TE)
            ours = hybridep(deep_ep_standin.HybridEPBuffer(plain, **arguments), "cpu", x_TD, map_TE)
        for place, (mine, other) in enumerate(zip(ours[0], theirs[0], strict=True)):
            assert torch.equal(mine, other.cpu()), (backend, ragged, place)
        for mine, other in zip(ours[1], theirs[1], strict=True):
            # equal terms in another order: float32 sums that are rounded to bfloat16 twice, on a rank and over ranks
            torch.testing.assert_close(mine, other.cpu(), rtol=2 * 2**-8, atol=0)


def main(backend: str) -> None:
    """On CUDA, one rank a device."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    flex_ranks.setup(expert=int(os.environ["WORLD_SIZE"]), transport="nccl", library=None)
    contract(importlib.import_module("deep_ep"), backend, "cuda", dist.new_group(backend="gloo"))
    flex_ranks.compare_bfloat16(backend)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
