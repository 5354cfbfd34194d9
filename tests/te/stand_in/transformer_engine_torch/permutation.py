"""Moving rows to experts and back: the launchers of ``pytorch/triton/permutation.py``, no part of the extension.

Same arguments, same results as the Triton kernels that they replace: ``tests/te/test_stand_ins.py`` runs both.
"""

from typing import Any

import torch


def make_row_id_map(routing_map: torch.Tensor, num_tokens: int, num_experts: int) -> torch.Tensor:
    """Where each token's rows go: int32 [T, 2E + 1], see Transformer Engine's docstring; unused places hold -1 here."""
    map_TE = routing_map.bool()
    row_ET = (map_TE.T.flatten().cumsum(0) - 1).view(num_experts, num_tokens)
    row_TE = torch.where(map_TE, row_ET.T, -1)
    ordered, expert = row_TE.sort(dim=1, descending=True)
    expert = torch.where(ordered >= 0, expert, -1)
    return torch.cat([ordered, expert, map_TE.sum(1, keepdim=True)], dim=1).int()


def _routes(row_id_map: torch.Tensor, num_experts: int, pad_offsets: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Of every routed pair the token, the row and the expert, int64 [N] each."""
    map_long = row_id_map.long()
    used = torch.arange(num_experts) < map_long[:, 2 * num_experts, None]
    token, place = used.nonzero(as_tuple=True)
    row, expert = map_long[token, place], map_long[token, num_experts + place]
    return token, row if pad_offsets is None else row + pad_offsets.long()[expert], expert


def permute_with_mask_map(
    inp, row_id_map, probs, scale, pad_offsets, num_tokens, num_experts, num_out_tokens, hidden_size, scale_hidden_dim
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Rows in the experts' order [num_out_tokens, D], with their scales and weights; a row of weight zero is zero."""
    token, row, expert = _routes(row_id_map, num_experts, pad_offsets)
    output = inp.new_zeros(num_out_tokens, hidden_size)
    rows = inp[token]
    permuted_probs = permuted_scale = None
    if probs is not None:
        weight = probs[token, expert]
        rows = torch.where(weight[:, None] == 0, torch.zeros_like(rows), rows)
        permuted_probs = probs.new_zeros(num_out_tokens).index_put_((row,), weight)
    if scale is not None:
        permuted_scale = scale.new_zeros(num_out_tokens, scale_hidden_dim).index_put_((row,), scale[token])
    return output.index_put_((row,), rows), permuted_scale, permuted_probs


def unpermute_with_mask_map(
    inp, row_id_map, merging_probs, permuted_probs, pad_offsets, num_tokens, num_experts, hidden_size
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens' sums over their rows [T, D], summed in float32, and their rows' weights [T, E]."""
    token, row, expert = _routes(row_id_map, num_experts, pad_offsets)
    rows = inp[row].float()
    if merging_probs is not None:
        rows = rows * merging_probs[token, expert].float()[:, None]
    output = torch.zeros(num_tokens, hidden_size).index_add_(0, token, rows).to(inp.dtype)
    if permuted_probs is None:
        return output, None
    unpermuted = permuted_probs.new_zeros(num_tokens, num_experts)
    return output, unpermuted.index_put_((token, expert), permuted_probs[row])


def unpermute_with_mask_map_bwd_with_merging_probs(
    fwd_output_grad,
    row_id_map,
    fwd_input,
    merging_probs,
    pad_offsets,
    num_tokens,
    num_experts,
    num_out_tokens,
    hidden_size,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of rows and merging weights."""
    token, row, expert = _routes(row_id_map, num_experts, pad_offsets)
    grad = fwd_output_grad[token].float()
    rows = grad * merging_probs[token, expert].float()[:, None]
    act_grad = fwd_output_grad.new_zeros(num_out_tokens, hidden_size)
    act_grad.index_put_((row,), rows.to(fwd_output_grad.dtype))
    probs_grad = torch.zeros_like(merging_probs)
    products = (fwd_input[row].float() * grad).sum(1).to(merging_probs.dtype)
    return act_grad, probs_grad.index_put_((token, expert), products)


def make_chunk_sort_map(
    split_sizes: torch.Tensor, sorted_indices: torch.Tensor, num_tokens: int, num_splits: int
) -> torch.Tensor:
    """Where each row goes when chunks are put in the order of ``sorted_indices``: int32 [rows].

    Rows beyond the chunks stay.
    """
    sizes, order = split_sizes.long(), sorted_indices.long()
    starts = torch.zeros_like(sizes)
    starts[order] = sizes[order].cumsum(0) - sizes[order]
    moved = int(sizes.sum())
    target = torch.arange(num_tokens)
    within = target[:moved] - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    target[:moved] = starts.repeat_interleave(sizes) + within
    return target.int()


def sort_chunks_by_map(
    inp: torch.Tensor,
    row_id_map: torch.Tensor,
    probs: torch.Tensor | None,
    num_tokens: int,
    hidden_size: int,
    is_forward: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows [N, D] and weights [N] in the new order, or back."""
    index = row_id_map.long()

    def move(values: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(values).index_put_((index,), values) if is_forward else values[index]

    return move(inp), None if probs is None else move(probs.flatten())


LAUNCHERS: tuple[Any, ...] = (
    make_row_id_map,
    permute_with_mask_map,
    unpermute_with_mask_map,
    unpermute_with_mask_map_bwd_with_merging_probs,
    make_chunk_sort_map,
    sort_chunks_by_map,
)
