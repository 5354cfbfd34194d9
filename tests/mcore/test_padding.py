"""Padded tokens count in no loss, record or statistic, wherever they stand and whatever is in them."""

from dataclasses import replace

import pytest
import torch

from megatron_dynmoe.config import PRESETS, DynMoEConfig
from megatron_dynmoe.losses import Totals
from megatron_dynmoe.metrics import RoutingStats
from megatron_dynmoe.routers import GATES, RULES, route
from megatron_dynmoe.routers.adaptation import Records
from megatron_dynmoe.routers.auxiliary import router_losses
from megatron_dynmoe.routers.registry import Routed
from tests import ranks

T, D, E = 40, 16, 6


def _routed(dynmoe, x_TD):
    """The routing of these tokens by the same router each time, and its weight."""
    generator = torch.Generator().manual_seed(1)
    gate, rule = GATES[dynmoe.gate], RULES[dynmoe.rule]
    columns = E + dynmoe.zero_computation_experts
    shape = (columns, D) if gate.weight_shape is None else gate.weight_shape(columns, D)
    weight = torch.randn(shape, generator=generator)
    parameters = {}
    for declared in (gate.parameters, rule.parameters):
        for name, value in ({} if declared is None else declared(dynmoe, columns, D)).items():
            parameters[name] = value if isinstance(value, torch.Tensor) else torch.randn(value, generator=generator)
    active_E = torch.arange(columns) < columns - 1 if dynmoe.adaptive_experts else None
    routing = route(x_TD, weight, dynmoe, parameters=parameters, active_E=active_E, training=True)
    return routing, weight, active_E


def _losses(routing, dynmoe, weight, active_E, tokens):
    map_TC = routing.map_TC
    totals = Totals(
        rows_C=map_TC.sum(dim=0).float(),
        tokens=torch.tensor(float(tokens)),
        routed_tokens=map_TC.any(dim=-1).sum().float(),
        ranks=1,
    )
    routed = Routed(routing, dynmoe, totals, weight, active_E=active_E)
    return {name: loss for name, (_, loss) in router_losses(routed).items()}


@pytest.fixture(params=PRESETS)
def dynmoe(request):
    more = {"efficiency_coeff": 1e-2, "load_balance_coeff": 1e-2} if request.param == "dynmoe" else {}
    return DynMoEConfig.from_preset(request.param, z_loss_coeff=1e-3, **more)


@pytest.fixture
def tokens():
    """Tokens with garbage where there is padding, and which are none."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(T, D, generator=generator), torch.rand(T, generator=generator) < 0.6


def test_losses_are_those_of_the_other_tokens_alone(dynmoe, tokens):
    x_TD, valid_T = tokens
    leaves = [x_TD.clone().requires_grad_(), x_TD[valid_T].requires_grad_()]
    padded, weight, active_E = _routed(dynmoe, leaves[0])
    alone, _, _ = _routed(dynmoe, leaves[1])
    count = int(valid_T.sum())
    found = _losses(padded.select(valid_T), dynmoe, weight, active_E, count)
    wanted = _losses(alone, dynmoe, weight, active_E, count)
    assert found.keys() == wanted.keys() and "z_loss" in found
    for losses in (found, wanted):
        sum(losses.values()).backward()
    # float32 sums over the same numbers, zeros among them, in another order
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaves[0].grad[valid_T], leaves[1].grad, rtol=1e-4, atol=1e-6)
    assert (leaves[0].grad[~valid_T] == 0).all()


def test_what_padding_holds_does_not_matter(dynmoe, tokens):
    x_TD, valid_T = tokens
    x_TD = torch.where(valid_T.unsqueeze(-1), x_TD, torch.nan)
    routing, weight, active_E = _routed(dynmoe, x_TD)
    losses = _losses(routing.select(valid_T), dynmoe, weight, active_E, int(valid_T.sum()))
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("buckets", [1, E])
def test_records_and_statistics_count_the_other_tokens(tokens, buckets):
    x_TD, valid_T = tokens
    dynmoe = DynMoEConfig.from_preset("dynmoe")
    padded, _, active_E = _routed(dynmoe, x_TD)
    padded.map_TE[::3] = False  # tokens that visit nobody, padded and not
    tensors = {n: v for n, v in vars(padded).items() if isinstance(v, torch.Tensor) and v.dim()}
    alone = replace(padded, **{name: value[valid_T] for name, value in tensors.items()})
    records = [Records.empty(E, D, buckets=buckets) for _ in range(2)]
    records[0].add(x_TD, padded.map_TE, padded.scores_TC, active_E, valid_T)
    records[1].add(x_TD[valid_T], alone.map_TE, alone.scores_TC, active_E)
    assert 0 < records[1].unrouted_B.sum() < (~padded.map_TE.any(dim=-1)).sum()
    torch.testing.assert_close(vars(records[0]), vars(records[1]))
    stats = [RoutingStats(1, E) for _ in range(2)]
    stats[0].add(0, padded, valid_T)
    stats[1].add(0, alone)
    assert stats[0].counts.sum() > 0 and torch.equal(stats[0].counts, stats[1].counts)


def check_layers_log_the_losses_of_the_other_tokens() -> None:
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    from tests.mcore.layers import D, layer_config, layer_of, set_up

    set_up()
    for preset in PRESETS:
        dynmoe = DynMoEConfig.from_preset(preset, z_loss_coeff=1e-3)
        layer = layer_of(layer_config(), dynmoe)
        x = torch.randn(8, 2, D)
        mask = torch.zeros(2, 8, dtype=torch.bool)
        mask[:, 5:] = True  # [B, S]; the last three of each sequence
        found = []
        for hidden, padding in ((x, mask), (x[:5], None)):
            layer(hidden, padding_mask=padding)[0].sum().backward()
            logged = get_moe_metrics_tracker().metrics
            found.append({name: entry.values.clone() for name, entry in logged.items()})
            get_moe_metrics_tracker().clear()
        assert found[0].keys() == found[1].keys() and "z_loss" in found[0]
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)  # as above


def test_layers_log_the_losses_of_the_other_tokens(tmp_path):
    ranks.call(check_layers_log_the_losses_of_the_other_tokens, ranks=1, folder=tmp_path)
