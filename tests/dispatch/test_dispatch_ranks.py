"""The moves across ranks: skewed maps against the dense reference, and the waits for the device."""

import torch
import torch.distributed as dist

from tests import ranks

T, D, F, E = 12, 8, 4, 4


def maps(rank: int) -> dict[str, torch.Tensor]:
    """Routing maps of this rank; ranks have different tokens."""
    generator = torch.Generator().manual_seed(rank)
    empty = torch.zeros(T, E, dtype=torch.bool)
    first_expert, rank_zero, one_rank_sends = empty.clone(), empty.clone(), empty.clone()
    first_expert[:, 0] = True
    rank_zero[:, : E // 2] = True
    one_rank_sends[:] = rank == 1
    return {
        "ragged": torch.rand(T, E, generator=generator) < 0.5,
        "every expert: more rows than T * k": torch.ones(T, E, dtype=torch.bool),
        "all rows to one expert": first_expert,
        "a rank without rows": rank_zero,
        "no row in the whole step": empty,
        "one rank sends, the other does not": one_rank_sends,
        "one token": torch.rand(1, E, generator=generator) < 0.7,
    }


def check_against_dense() -> None:
    dist.init_process_group("gloo")
    for name, routing_map in maps(dist.get_rank()).items():
        for unit in ("expert", "rank"):
            compare(f"{name}, per {unit}", routing_map, unit)
    dist.destroy_process_group()


def compare(name: str, routing_map: torch.Tensor, unit: str) -> None:
    """Output and all gradients of one layer on R ranks against the dense reference on one."""
    from megatron_dynmoe import reference
    from megatron_dynmoe.dispatch import combine, dispatch
    from megatron_dynmoe.experts import grouped_mlp
    from megatron_dynmoe.routing import RoutePlan

    rank, size, tokens = dist.get_rank(), dist.get_world_size(), routing_map.shape[0]
    local = slice(rank * E // size, (rank + 1) * E // size)
    torch.manual_seed(0)
    fc1, fc2 = torch.randn(E, 2 * F, D), torch.randn(E, D, F)
    torch.manual_seed(100 + rank)
    x = torch.randn(tokens, D, requires_grad=True)
    weights = torch.where(routing_map, torch.rand(tokens, E), 0.0).requires_grad_()
    mine = [fc1[local].clone().requires_grad_(), fc2[local].clone().requires_grad_()]
    plan = RoutePlan.build(routing_map, group=dist.group.WORLD, expert_rank=rank, expert_ranks=size)
    rows, row_weights, transport = dispatch(x, weights, plan, dist.group.WORLD, unit=unit)
    assert rows.shape[0] == sum(plan.rows_per_expert_L), name
    out = combine(grouped_mlp(rows, row_weights, *mine, plan.rows_per_expert_L), transport, tokens)
    out.square().sum().backward()

    # the counter: rows on the wire are exactly the distinct pairs of the unit
    pairs = routing_map if unit == "expert" else routing_map.view(tokens, size, E // size).any(-1)
    assert sum(transport.splits[1]) == int(pairs.sum()), name
    total = torch.tensor([int(routing_map.sum()), rows.shape[0], int(pairs.sum()), sum(transport.splits[0])])
    dist.all_reduce(total)
    assert total[0] == total[1] == plan.total_rows, f"{name}: {total[0]} rows routed, {total[1]} computed"
    assert total[2] == total[3], f"{name}: {total[2]} rows sent, {total[3]} received"

    whole = [fc1.clone().requires_grad_(), fc2.clone().requires_grad_()]
    x2, weights2 = x.detach().requires_grad_(), weights.detach().requires_grad_()
    expected = reference.dense_moe(x2, torch.where(routing_map, weights2, 0.0), *whole)
    expected.square().sum().backward()
    for weight in whole:  # an expert's gradient comes from the tokens of all ranks
        dist.all_reduce(weight.grad)
    pairs = [(out, expected), (x.grad, x2.grad), (torch.where(routing_map, weights.grad, 0.0), weights2.grad)]
    pairs += [(ours.grad, theirs.grad[local]) for ours, theirs in zip(mine, whole, strict=True)]
    for got, wanted in pairs:
        # float32 sums of at most 48 products of numbers of the size of the result, in another order
        assert (got - wanted).abs().max() <= 64 * torch.finfo(torch.float32).eps * (1 + wanted.abs().max()), name


def check_overlap_order() -> None:
    """What runs between start and wait runs there, forward and backward: gloo's wait is real."""
    from megatron_dynmoe.dispatch.moves import Exchange

    events: list[str] = []

    class Watched(Exchange):
        def launch(self, *args):
            events.append("start")
            super().launch(*args)

        def land(self):
            events.append("wait")
            return super().land()

    class Local(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            events.append("local")
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            events.append("local")
            return grad * 2

    dist.init_process_group("gloo")
    x = torch.ones(4, 2, requires_grad=True)
    exchange = Watched(x * 1, [2, 2], [2, 2], dist.group.WORLD)
    local = Local.apply(x)
    (exchange.wait().sum() + local.sum()).backward()
    assert events == ["start", "local", "wait", "start", "local", "wait"], events
    assert x.grad.eq(3).all()
    dist.destroy_process_group()


def check_gather_and_reduce_scatter() -> None:
    from megatron_dynmoe.dispatch.moves import gather_over, reduce_scatter_over

    dist.init_process_group("gloo")
    rank, sizes = dist.get_rank(), [3, 0, 2]
    rows = (torch.arange(sizes[rank] * 2.0).view(-1, 2) + 100 * rank).requires_grad_()
    sent, swap = [], dist.batch_isend_irecv
    dist.batch_isend_irecv = lambda moves: sent.extend(m.tensor for m in moves if m.op is dist.isend) or swap(moves)
    gathered = gather_over(rows, sizes, dist.group.WORLD)
    assert [piece.data_ptr() for piece in sent] == [rows.data_ptr()] * (2 if sizes[rank] else 0)  # itself, no copies
    assert gathered.tolist() == [[0, 1], [2, 3], [4, 5], [200, 201], [202, 203]]
    (gathered * (rank + 1)).sum().backward()
    assert rows.grad.eq(1 + 2 + 3).all()
    back = reduce_scatter_over(gathered.detach(), sizes, dist.group.WORLD)
    assert torch.equal(back, 3 * rows.detach())
    parts = gathered.detach().requires_grad_()
    (reduce_scatter_over(parts, sizes, dist.group.WORLD) * (rank + 1)).sum().backward()
    assert parts.grad[:, 0].tolist() == [1, 1, 1, 3, 3]  # of each row, from the rank that keeps its sum
    # 256 + 1 is lost in bfloat16; 256 + 1 + 1 in float32 is 258, which bfloat16 holds: forward and backward
    wide = torch.full((5, 1), 256.0 if rank == 0 else 1.0, dtype=torch.bfloat16)
    assert reduce_scatter_over(wide, sizes, dist.group.WORLD).eq(258).all()
    narrow = torch.zeros(sizes[rank], 1, dtype=torch.bfloat16, requires_grad=True)
    gather_over(narrow, sizes, dist.group.WORLD).backward(wide)
    assert narrow.grad.eq(258).all()
    dist.destroy_process_group()


def test_skewed_maps_against_the_dense_reference(tmp_path):
    ranks.call(check_against_dense, ranks=2, folder=tmp_path)


def test_on_four_ranks_with_one_expert_each(tmp_path):
    ranks.call(check_against_dense, ranks=4, folder=tmp_path)


def test_local_work_runs_while_rows_travel(tmp_path):
    ranks.call(check_overlap_order, ranks=2, folder=tmp_path)


def test_uneven_gather_and_its_reverse(tmp_path):
    ranks.call(check_gather_and_reduce_scatter, ranks=3, folder=tmp_path)


def test_plan_waits_for_the_device_once(monkeypatch):
    """``Tensor.tolist``, ``item``, ``cpu``, ``nonzero`` and ``bool`` wait on CUDA; the plan may use one once."""
    from megatron_dynmoe.routing import RoutePlan

    waits = []
    for name in ("tolist", "item", "cpu", "nonzero", "__bool__", "__int__", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, _original=original, _name=name, **kwargs):
            waits.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    plan = RoutePlan.build(torch.rand(64, 8) < 0.3)
    assert plan.token_of_row_N.shape[0] == plan.rows_sent
    assert waits == ["tolist"]
