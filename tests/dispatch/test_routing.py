"""RoutePlan and the moves along it: hand-worked integers on one rank."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dynmoe.dispatch import TRANSPORTS, choose_unit, combine, dispatch, per_expert
from megatron_dynmoe.dispatch.align import align_rows, aligned_sizes, unalign_rows
from megatron_dynmoe.dispatch.moves import scatter_rows
from megatron_dynmoe.dispatch.per_expert import group_by_expert, ungroup_by_expert
from megatron_dynmoe.routing import RoutePlan
from megatron_dynmoe.units import weight_bytes, wire_bytes

#          expert  0  1  2  3
MAP = torch.tensor(
    [
        [1, 0, 1, 0],
        [0, 0, 0, 0],  # a token that visits nobody
        [1, 0, 1, 1],
    ],
    dtype=torch.bool,
)


def test_plan_by_hand():
    plan = RoutePlan.build(MAP)
    assert plan.sent_E == (2, 0, 2, 1)
    assert plan.rows_sent == 5
    assert plan.rows_per_expert_L == plan.rows_L.tolist() == [2, 0, 2, 1]
    assert plan.wire_splits("expert") == ([5], [5])
    assert plan.wire_splits("rank") == ([2], [2])  # two tokens visit somebody
    assert (plan.total_rows, plan.total_pairs) == (5, 2)
    assert plan.pair_index_M2.tolist() == [[0, 0], [0, 2]]
    assert plan.expert_of_row_N.tolist() == [0, 0, 2, 2, 3]
    assert plan.token_of_row_N.tolist() == [0, 2, 0, 2, 2]


def test_per_expert_rows_by_hand():
    x = torch.tensor([[10.0], [20.0], [30.0]])
    weights = torch.arange(12.0).view(3, 4)
    rows, row_weights = TRANSPORTS["expert"](RoutePlan.build(MAP)).pack(x, weights)
    assert rows.flatten().tolist() == [10, 30, 10, 30, 30]
    assert row_weights.tolist() == [0, 8, 2, 10, 11]


def test_per_rank_rows_by_hand():
    x = torch.tensor([[10.0], [20.0], [30.0]])
    weights = torch.arange(12.0).view(3, 4)
    transport = TRANSPORTS["rank"](RoutePlan.build(MAP))
    rows, row_weights = transport.pack(x, weights)
    assert rows.flatten().tolist() == [10, 30]
    none = -torch.inf
    assert row_weights.tolist() == [[0, none, 2, none], [8, none, 10, 11]]
    expanded, expanded_weights, origin = transport.unpack(rows, row_weights)
    assert expanded.flatten().tolist() == [10, 30, 10, 30, 30]
    assert expanded_weights.tolist() == [0, 8, 2, 10, 11]
    back = transport.repack(torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]]), origin)
    assert back.flatten().tolist() == [5, 26]
    assert transport.unpack_back(back, 3).flatten().tolist() == [5, 0, 26]


def test_rows_sum_by_token_and_none_gives_zero():
    rows = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])
    assert TRANSPORTS["expert"](RoutePlan.build(MAP)).unpack_back(rows, 3).flatten().tolist() == [5, 0, 26]
    onto = torch.tensor([[100.0], [200.0], [300.0]])
    sums = TRANSPORTS["expert"](RoutePlan.build(MAP)).unpack_back(rows, 3, onto)
    assert sums.flatten().tolist() == [105, 200, 326]
    assert sums.data_ptr() == onto.data_ptr()  # no pass over T x D but that of the rows


def plan_of(received_PRL, pairs_received_PR):
    experts = len(received_PRL[0]) * len(received_PRL[0][0])
    return RoutePlan(
        sent_E=(0,) * experts,
        received_PRL=received_PRL,
        pairs_sent_R=(0,) * len(received_PRL[0]),
        pairs_received_PR=pairs_received_PR,
        total_rows=0,
        total_pairs=0,
        tensor_rank=0,
        map_TE=torch.zeros(0, experts, dtype=torch.bool),
        visited_TR=torch.zeros(0, len(received_PRL[0]), dtype=torch.bool),
        rows_PRL=torch.tensor(received_PRL),
    )


def test_chunks_change_places_and_return():
    # three senders, two local experts; rows named sender * 10 + expert
    plan = plan_of((((1, 2), (0, 1), (2, 0)),), ((2, 1, 2),))
    rows = torch.tensor([0, 1, 1, 11, 20, 20])
    assert plan.rows_per_expert_L == [3, 3]
    assert plan.wire_splits("expert")[0] == [3, 1, 2]
    assert plan.wire_splits("rank")[0] == [2, 1, 2]
    grouped = group_by_expert(rows, plan)
    assert grouped.tolist() == [0, 20, 20, 1, 1, 11]
    assert torch.equal(ungroup_by_expert(grouped, plan), rows)


@pytest.mark.parametrize("tensor_ranks", [1, 2])
def test_many_chunks_by_an_index_are_as_few_by_views(monkeypatch, tensor_ranks):
    """One permutation of rows, by both forms: nothing is computed, so equal to the bit, and so are the gradients."""
    sizes = torch.randint(0, 4, (tensor_ranks, 5, 7), generator=torch.Generator().manual_seed(3))
    sizes[0, 1] = sizes[:, :, 2] = 0  # a sender without rows, an expert without rows
    plan = plan_of(tuple(tuple(map(tuple, ranks)) for ranks in sizes.tolist()), ((0,) * 5,) * tensor_ranks)
    total = int(sizes.sum())
    x, factor = torch.randn(total, 3, requires_grad=True), torch.randn(total, 3)

    def run(few):
        monkeypatch.setattr(per_expert, "FEW_CHUNKS", few)
        grouped = group_by_expert(x, plan)
        back = ungroup_by_expert(grouped * factor, plan)
        return grouped, back, torch.autograd.grad((back * factor).sum(), x)[0]

    by_views, by_index = run(10**6), run(0)
    assert all(map(torch.equal, by_views, by_index))
    assert not torch.equal(by_index[0], x)


def test_sums_of_a_plan_are_computed_once():
    plan = plan_of((((1, 2), (0, 1), (2, 0)),), ((2, 1, 2),))
    for name in ("rows_per_expert_L", "chunks_PRL", "arrival_index_N", "rows_L"):
        assert getattr(plan, name) is getattr(plan, name), name
    assert plan.wire_splits("expert") is plan.wire_splits("expert")
    assert plan.gathered_splits("expert") is plan.gathered_splits("expert")


def kernels(function, *args):
    """How many operations of torch a call launches, forward and backward."""
    count = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            nonlocal count
            count += 1
            return operation(*args, **(kwargs or {}))

    with Count():
        function(*args).sum().backward()
    return count


def test_alignment_by_hand():
    rows, sizes = torch.tensor([1.0, 2, 3, 4, 5]), [3, 0, 2]
    assert aligned_sizes(sizes, 2) == [4, 0, 2]
    aligned = align_rows(rows, sizes, 2)
    assert aligned.tolist() == [1, 2, 3, 0, 4, 5]
    assert torch.equal(unalign_rows(aligned, sizes, 2), rows)


@pytest.mark.parametrize("sizes", [[3, 0, 2, 5], [0, 0], [4, 8], [0, 1]], ids=str)
def test_alignment_is_padding_of_each_group(sizes):
    """Against the obvious form, a group at a time: rows are moved, so equal to the bit, and so are the gradients."""
    x = torch.randn(sum(sizes), 3, requires_grad=True)
    padded = [F.pad(group, (0, 0, 0, -len(group) % 4)) for group in x.split(sizes)]
    wanted, got = torch.cat(padded), align_rows(x, sizes, 4)
    assert torch.equal(got, wanted)
    factor = torch.randn_like(wanted)
    grads = [torch.autograd.grad((aligned * factor).sum(), x)[0] for aligned in (wanted, got)]
    assert torch.equal(*grads)
    y = torch.randn_like(wanted, requires_grad=True)
    groups = zip(y.split(aligned_sizes(sizes, 4)), sizes, strict=True)
    wanted, got = torch.cat([group[:size] for group, size in groups]), unalign_rows(y, sizes, 4)
    assert torch.equal(got, wanted)
    factor = torch.randn_like(wanted)
    assert torch.equal(*(torch.autograd.grad((rows * factor).sum(), y)[0] for rows in (wanted, got)))


@pytest.mark.parametrize("function", [align_rows, unalign_rows])
def test_alignment_launches_as_much_for_many_experts_as_for_few(function):
    few, many = (kernels(function, torch.randn(16 * n, 2, requires_grad=True), [16] * n, 16) for n in (2, 40))
    assert few == many


def test_chunks_are_sorted_by_the_kernel_that_is_handed_in():
    """megatron-core's own function stands for Transformer Engine's, whose arguments and order it has."""
    from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs

    calls = []

    def sort(*args):
        calls.append(args[-1] is not None)
        return sort_chunks_by_idxs(*args)

    plan = plan_of((((1, 2, 0), (0, 1, 3), (2, 0, 1)),), ((0, 0, 0),))
    rows, weights = torch.randn(10, 2), torch.rand(10)
    transport = TRANSPORTS["expert"](plan, sort_chunks=sort)
    grouped, grouped_weights, _ = transport.unpack(rows, weights)
    assert torch.equal(grouped, group_by_expert(rows, plan))
    assert torch.equal(grouped_weights, group_by_expert(weights, plan))
    assert torch.equal(transport.repack(grouped), rows)
    assert calls == [True, False]


def test_auto_takes_the_unit_that_moves_fewer_bytes():
    from dataclasses import replace

    two_ranks = replace(plan_of((((1, 1), (1, 1)),), ((1, 1),)), total_rows=1000, total_pairs=1000)
    assert choose_unit(two_ranks, width=64, itemsize=4) == "expert"  # nothing saved, weights for two experts to pay
    assert choose_unit(replace(two_ranks, total_pairs=600), width=64, itemsize=4) == "rank"
    # per row: 64 * 4 + 4 = 260 bytes; per pair: 64 * 4 + 8 = 264; 20 % are saved below 0.8 * 260 / 264 = 0.788
    assert choose_unit(replace(two_ranks, total_pairs=787), width=64, itemsize=4) == "rank"
    assert choose_unit(replace(two_ranks, total_pairs=789), width=64, itemsize=4) == "expert"
    row = {"width": 64, "itemsize": 4}
    assert wire_bytes(**row, beside=weight_bytes("expert", 2), ways=1) == 260
    assert wire_bytes(**row, beside=weight_bytes("rank", 2)) == 2 * 256 + 8  # there with two weights, and back
    assert choose_unit(RoutePlan.build(MAP), width=64, itemsize=4) == "expert"  # one rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_a_tokens_rows_are_float32(dtype):
    # 256 + 1 is lost in bfloat16; 256 + 1 + 1 in float32 is 258, which bfloat16 holds
    routing_map = torch.ones(1, 3, dtype=torch.bool)
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=dtype)
    plan = RoutePlan.build(routing_map)
    assert scatter_rows(rows, plan.token_of_row_N, 1).item() == 258
    assert scatter_rows(rows[1:], plan.token_of_row_N[1:], 1, rows[:1].clone()).item() == 258


@pytest.mark.parametrize(
    "routing_map",
    [
        torch.zeros(4, 3, dtype=torch.bool),
        torch.ones(4, 3, dtype=torch.bool),
        torch.zeros(0, 3, dtype=torch.bool),
        torch.tensor([[True, False, False]]),
        torch.tensor([[False, True, False]] * 5),
    ],
    ids=["no row", "all to all", "no token", "one token", "all to one expert"],
)
@pytest.mark.parametrize("unit", ["expert", "rank"])
@pytest.mark.parametrize("onto", [None, torch.float32, torch.bfloat16], ids=["alone", "onto", "onto bfloat16"])
def test_nothing_lost_nothing_padded(routing_map, unit, onto):
    tokens, experts = routing_map.shape
    x = torch.randn(tokens, 2, requires_grad=True)
    weights = torch.where(routing_map, torch.rand(tokens, experts), 0.0).requires_grad_()
    plan = RoutePlan.build(routing_map)
    rows, row_weights, transport = dispatch(x, weights, plan, unit=unit)
    assert rows.shape[0] == row_weights.shape[0] == plan.rows_sent == int(routing_map.sum())
    rows, start = rows * row_weights.unsqueeze(1), torch.randn(tokens, 2, dtype=onto, requires_grad=True)
    rows = rows.to(start.dtype)
    out = combine(rows, transport, tokens, None if onto is None else (start * 3).view(tokens, 1, 2)[:, 0])
    expected = x * torch.where(routing_map, weights, 0).sum(dim=1, keepdim=True)
    expected = expected if onto is None else (expected + (start * 3).float()).to(onto)
    # each is a sum of at most four float32 products; in bfloat16 the rows, of size 10 and less, and the sum are rounded
    near = {"rtol": 1e-6, "atol": 1e-6} if onto != torch.bfloat16 else {"rtol": 2**-7, "atol": 10 * 2**-7}
    assert torch.allclose(out, expected, **near)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, (x, weights, start), grad, allow_unused=onto is None)
    wanted = torch.autograd.grad(expected, (x, weights, start), grad, allow_unused=onto is None)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, **near))


def test_plan_refuses_what_is_no_map():
    with pytest.raises(ValueError, match="bool"):
        RoutePlan.build(torch.ones(2, 2))
    with pytest.raises(ValueError, match="does not divide --num-experts 3"):
        RoutePlan.build(torch.ones(2, 3, dtype=torch.bool), expert_ranks=2)
