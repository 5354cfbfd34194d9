"""The adaptive number of experts: schedule, records, updates, and the mask's order; no Megatron."""

import pytest
import torch

from megatron_dynmoe import reference
from megatron_dynmoe.routers.adaptation import Change, Records, Schedule, adapt, initial_mask, slot_order


def test_schedule_is_in_iterations():
    plan = Schedule(record_from=3, update_at=6, period=9)
    assert [step for step in range(20) if plan.records(step)] == [3, 4, 5, 12, 13, 14]
    assert [step for step in range(20) if plan.updates(step)] == [5, 14]
    assert not any(Schedule(3, 6, 0).records(step) or Schedule(3, 6, 0).updates(step) for step in range(20))


def test_a_window_may_fill_the_period():
    plan = Schedule(record_from=0, update_at=4, period=4)
    assert all(plan.records(step) for step in range(12))
    assert [step for step in range(12) if plan.updates(step)] == [3, 7, 11]


def test_slots_are_filled_evenly():
    assert slot_order(8) == [0, 4, 2, 6, 1, 5, 3, 7]
    assert slot_order(1) == [0]
    assert sorted(slot_order(6)) == list(range(6))
    for ranks in (2, 4, 8):
        for active in range(1, 17):
            per_rank = initial_mask(16, active).view(ranks, -1).sum(dim=1)
            assert per_rank.max() - per_rank.min() <= 1
    assert initial_mask(5, None).all()


def test_records_by_hand():
    records = Records.empty(3, 2, buckets=1)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    map_TE = torch.tensor([[True, True, False], [False, False, False], [False, False, False]])
    scores, active = torch.zeros(3, 3), torch.tensor([True, True, False])
    for _ in range(2):
        records.add(x, map_TE, scores, active)
    assert records.rows_E.tolist() == [2, 2, 0]
    assert records.unrouted_B.tolist() == [4]
    assert records.sums_BD.tolist() == [[16.0, 20.0]]


def test_buckets_are_those_of_the_nearest_active_expert():
    records = Records.empty(3, 2, buckets=3)
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    scores = torch.tensor([[0.1, 0.2, 0.9], [0.3, 0.2, 0.9], [0.1, 0.4, 0.9]])  # the third is not active
    records.add(x, torch.zeros(3, 3, dtype=torch.bool), scores, torch.tensor([True, True, False]))
    assert records.unrouted_B.tolist() == [1, 2, 0]
    assert records.sums_BD.tolist() == [[0.0, 1.0], [3.0, 2.0], [0.0, 0.0]]


def test_bfloat16_tokens_are_summed_in_float32_and_routed_infinities_stay_out():
    records = Records.empty(2, 1, buckets=1)
    x = torch.full((300, 1), 1.0, dtype=torch.bfloat16)
    x[0] = float("inf")
    map_TE = torch.zeros(300, 2, dtype=torch.bool)
    map_TE[0, 0] = True
    records.add(x, map_TE, torch.zeros(300, 2), torch.ones(2, dtype=torch.bool))
    assert records.sums_BD.item() == 299  # bfloat16 counts to 256


@pytest.mark.parametrize("seed", range(6))
def test_update_against_the_reference(seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(20, 4, generator=generator), torch.randn(6, 4, generator=generator)
    active = initial_mask(6, 4 + seed % 3)
    map_TE = (torch.rand(20, 6, generator=generator) < 0.08 * (1 + seed)) & active
    records = Records.empty(6, 4, buckets=1)
    records.add(x, map_TE, torch.zeros(20, 6), active)
    change = adapt(active, records, weight, max_added=1)
    kept, embedding = reference.adapt(active.tolist(), [set(r.nonzero().flatten().tolist()) for r in map_TE], x)
    assert change.removed == [e for e in range(6) if active[e] and not kept[e]]
    assert change.unrouted == int((~map_TE.any(dim=1)).sum())
    assert len(change.added) == (embedding is not None)
    if embedding is not None:
        assert torch.allclose(change.embeddings_AD[0], embedding, rtol=0, atol=20 * 2**-24)  # sums of up to 20 terms
        assert not kept[change.added[0]]
        nearest = torch.nn.functional.normalize(weight, dim=1) @ embedding
        assert change.similar == [int(nearest.masked_fill(~active, -2).argmax())]
    mask = active.clone()
    change.apply(mask)
    assert int(mask.sum()) == sum(kept) + len(change.added)


def test_the_order_of_filling_and_several_at_once():
    records = Records(torch.tensor([5, 0, 5, 0]), torch.tensor([2, 0, 7, 0]), torch.eye(4))
    active = torch.tensor([True, False, True, False])
    change = adapt(active, records, torch.eye(4), max_added=4)
    # two buckets have tokens, the fuller first; the free slots in the order 0 2 1 3
    assert change.added == [1, 3]
    assert torch.equal(change.embeddings_AD, torch.eye(4)[[2, 0]])
    assert change.similar == [2, 0]


def test_what_changes_nothing():
    weight, active = torch.eye(2), torch.tensor([True, False])
    none, some = torch.zeros(2, dtype=torch.int64), torch.tensor([3, 0])
    assert adapt(active, Records(none, none[:1], torch.zeros(1, 2)), weight, max_added=1) == Change()
    assert adapt(active, Records(some, none[:1], torch.ones(1, 2)), weight, max_added=1).added == []
    for odd in (0.0, float("nan"), float("inf")):  # a sum without direction
        records = Records(some, some[:1], torch.full((1, 2), odd))
        assert adapt(active, records, weight, max_added=1).added == []
    full = torch.tensor([True, True])
    assert adapt(full, Records(some + 1, some[:1], torch.ones(1, 2)), weight, max_added=1).added == []


def test_when_nobody_is_visited_one_expert_takes_over():
    records = Records(torch.zeros(3, dtype=torch.int64), torch.tensor([9]), torch.ones(1, 4))
    change = adapt(torch.ones(3, dtype=torch.bool), records, torch.randn(3, 4), max_added=1)
    assert change.removed == [0, 1, 2]
    assert change.added == [0]
