"""The bound on routed rows: what it cuts, what it never cuts, gradients of the cut map."""

import torch

from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.routers import route
from megatron_dynmoe.routers.route import cap_rows, finish_weights


def test_by_hand():
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.35, 0.25], [0.9, 0.06, 0.04]])
    everything = torch.ones(3, 3, dtype=torch.bool)
    # the best of each, then .35 and .3 of the others
    assert cap_rows(everything, scores, 5).int().tolist() == [[1, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert cap_rows(everything, scores, 3).int().tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert cap_rows(everything, scores, 9).all()
    assert cap_rows(everything, scores, None).all()


def test_rows_stay_within_the_bound_and_no_token_loses_its_best():
    x, weight = torch.randn(200, 8), torch.randn(8, 8)
    free = route(x, weight, DynMoEConfig(top_p=0.95))
    for config, bound in (
        (DynMoEConfig(top_p=0.95, max_rows=250), 250),
        (DynMoEConfig(top_p=0.95, max_rows_per_token=1.5), 300),
        (DynMoEConfig(top_p=0.95, max_rows_per_token=1.5, max_rows=10), 200),  # never below one row a token
    ):
        capped = route(x, weight, config)
        assert int(capped.map_TE.sum()) == min(bound, int(free.map_TE.sum()))
        assert int(capped.cut) == int(free.map_TE.sum()) - int(capped.map_TE.sum())
        assert not (capped.map_TE & ~free.map_TE).any()
        assert capped.map_TE.gather(1, free.scores_TC.argmax(dim=1, keepdim=True)).all()
        kept = free.scores_TC[capped.map_TE & ~best(free)]
        lost = free.scores_TC[free.map_TE & ~capped.map_TE]
        assert kept.numel() == 0 or lost.max() <= kept.min()


def best(routing):
    return torch.zeros_like(routing.map_TE).scatter(1, routing.scores_TC.argmax(dim=1, keepdim=True), True)


def test_evaluation_is_not_bounded():
    x, weight = torch.randn(50, 8), torch.randn(6, 8)
    bounded, free = DynMoEConfig(top_p=0.9, max_rows=50), DynMoEConfig(top_p=0.9)
    assert torch.equal(route(x, weight, bounded, training=False).map_TE, route(x, weight, free).map_TE)
    assert int(route(x, weight, bounded).map_TE.sum()) == 50


def test_gradients_are_those_of_the_cut_map():
    x = torch.randn(50, 8, requires_grad=True)
    weight = torch.randn(6, 8, requires_grad=True)
    routing = route(x, weight, DynMoEConfig(top_p=0.9, max_rows=60))
    grads = torch.autograd.grad(routing.weights_TE.square().sum(), (x, weight))
    scores = torch.softmax(x @ weight.t(), dim=-1)
    expected = torch.autograd.grad(finish_weights(scores, routing.map_TE, normalize=False).square().sum(), (x, weight))
    for got, wanted in zip(grads, expected, strict=True):
        # the same float32 operations but for the order of one sum of 8 products
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-7)


def test_a_nan_row_neither_crowds_out_others_nor_disappears():
    x, weight = torch.randn(20, 8), torch.randn(6, 8)
    x[3] = float("nan")
    routing = route(x, weight, DynMoEConfig(top_p=0.9, max_rows=25))
    assert routing.map_TE[3].sum() == 1
    assert routing.weights_TE[3].isnan().any()
    assert routing.map_TE.any(dim=1).all()


def test_tokens_without_an_expert_leave_their_room():
    """Three tokens, one of them with no expert: a bound of three rows leaves two best ones and one more."""
    map_TE = torch.tensor([[True, True, True], [False, False, False], [True, False, True]])
    scores = torch.tensor([[0.9, 0.5, 0.6], [0.9, 0.9, 0.9], [0.3, 0.9, 0.4]])
    capped = cap_rows(map_TE, scores, 3)
    assert capped.tolist() == [[True, False, True], [False, False, False], [False, False, True]]
    assert torch.equal(cap_rows(map_TE, scores, 5), map_TE)
