"""DynMoE's load-balance loss: value and gradients of the public formulas, through padding and shared sequences."""

import pytest
import torch

from megatron_dynmoe import reference
from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.losses import Totals
from megatron_dynmoe.routers import route
from megatron_dynmoe.routers.auxiliary import router_losses
from megatron_dynmoe.routers.registry import Routed
from tests import ranks
from tests.routers.test_top_any import problem

CONFIG = DynMoEConfig(gate="cosine", rule="top-any", cosine_scale=2.0, load_balance_coeff=1.0)


def _problem(dtype=torch.float64):
    x, weight, parameters = problem(dtype=dtype)
    parameters["thresholds"] += 0.15  # so that some tokens activate nobody
    return x, weight.requires_grad_(), parameters["thresholds"].requires_grad_()


def _loss(x, weight, thresholds, totals):
    routing = route(x, weight, CONFIG, parameters={"thresholds": thresholds})
    return router_losses(Routed(routing, CONFIG, totals, weight))["load_balancing_loss"][1]


def _totals(x, weight, thresholds, ranks=1):
    map_TE = route(x, weight, CONFIG, parameters={"thresholds": thresholds}).map_TE
    assert not map_TE.any(dim=-1).all() and map_TE.sum(dim=-1).max() > 2  # unrouted tokens, and several sizes of k
    return Totals(map_TE.sum(dim=0).double(), torch.tensor(len(x)), map_TE.any(dim=-1).sum().double(), ranks)


def test_value_and_gradients_are_those_of_the_oracle():
    x, weight, thresholds = _problem()
    totals = _totals(x, weight, thresholds)
    expected = reference.top_any_balance(x, weight, thresholds, 2.0)
    wanted = torch.autograd.grad(expected, (weight, thresholds))
    whole = _loss(x, weight, thresholds, totals)
    shares = [_loss(part, weight, thresholds, totals) for part in (x[:20], x[20:])]
    for loss in (whole, sum(shares)):
        # float64 sums of 50 tokens and 6 experts in another order
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        got = torch.autograd.grad(loss, (weight, thresholds))
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-14)
    # The loss moves shares between experts: it does not push all thresholds the same way.
    assert wanted[1].min() < 0 < wanted[1].max()


def test_the_formula_by_hand():
    """One token at both of two experts, one at the first: f = [1, 1/2], loss = 2 (f_0 Q_0 + f_1 Q_1).

    dL/dg of the first token: 2 / 2 * (f_i / k - sum_j f_j g_j / k^2) = (1/2 - 3/8, 1/4 - 3/8) = (1/8, -1/8); of the
    second, with one expert: 2 / 2 * (1 - 1) = 0.  dg/dG = -sigmoid'(0) = -1/4.
    """
    config = DynMoEConfig(gate="cosine", rule="top-any", load_balance_coeff=1.0)
    thresholds = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    weight = torch.eye(2, dtype=torch.float64)
    routing = route(x, weight, config, parameters={"thresholds": thresholds})
    totals = Totals(torch.tensor([2.0, 1.0]), torch.tensor(2.0), torch.tensor(2.0), 1)
    loss = router_losses(Routed(routing, config, totals, weight))["load_balancing_loss"][1]
    assert loss.item() == pytest.approx(2 * (0.75 + 0.5 * 0.25))
    (gradient,) = torch.autograd.grad(loss, thresholds)
    assert gradient.tolist() == pytest.approx([-1 / 32, 1 / 32], rel=1e-12)


def test_a_token_that_visits_its_best_expert_for_want_of_another_has_no_gradient():
    x, weight, thresholds = _problem()
    x.requires_grad_()
    routing = route(x, weight, CONFIG, parameters={"thresholds": thresholds}, training=False)
    nobody = ~route(x, weight, CONFIG, parameters={"thresholds": thresholds}).map_TE.any(dim=-1)
    assert nobody.any() and (routing.weights_TE[nobody].amax(dim=-1) == 1).all()
    upstream = torch.randn(routing.weights_TE.shape, dtype=torch.float64)
    gradient = torch.autograd.grad((routing.weights_TE * upstream).sum(), x)[0]
    assert (gradient[nobody] == 0).all() and (gradient[~nobody] != 0).any(dim=-1).all()


def check_router() -> None:
    """Two ranks share a sequence; some of its tokens are padding."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_dynmoe.mcore.router import DynamicRouter
    from tests.mcore.layers import layer_config

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    model_parallel_cuda_manual_seed(1)
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    x, weight, thresholds = _problem(torch.float32)
    config = layer_config(
        tensor_model_parallel_size=2, sequence_parallel=True, num_moe_experts=6, hidden_size=12, ffn_hidden_size=48
    )
    router = DynamicRouter(config, get_default_pg_collection(), dynmoe=CONFIG)
    router.set_layer_number(1)
    with torch.no_grad():
        router.weight.copy_(weight)
        router.thresholds.copy_(thresholds)
    padding = torch.arange(50) % 7 == 3
    mine = slice(0, 25) if dist.get_rank() == 0 else slice(25, 50)
    routing = router(x[mine].unsqueeze(1), padding_mask=padding[mine].unsqueeze(1))
    routing.weights_TE.sum().mul(0).backward()  # nothing but the losses
    got = [router.weight.grad, router.thresholds.grad]
    for gradient in got:
        dist.all_reduce(gradient)
    expected = reference.top_any_balance(x[~padding], weight, thresholds, 2.0)
    wanted = torch.autograd.grad(expected, (weight, thresholds))
    for gradient, oracle in zip(got, wanted, strict=True):
        # float32: terms of both signs, at most 1/20 each, of which 43 are summed
        torch.testing.assert_close(gradient, oracle, rtol=1e-4, atol=1e-6)


def test_padding_and_sequence_parallel_ranks(tmp_path):
    ranks.call(check_router, ranks=2, folder=tmp_path)
