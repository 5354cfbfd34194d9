"""Controllers of a router, step by step on two tensor-parallel ranks; what is refused; how a skipped step is known."""

import contextlib
from unittest import mock

import pytest
import torch

from tests import ranks
from tests.mcore.layers import B, D, E, S, layer_config, layer_of


def _tokens(seed):
    return torch.randn(S, B, D, generator=torch.Generator().manual_seed(seed))


def _tensor_parallel(dynmoe, **extra):
    return layer_of(layer_config(tensor_model_parallel_size=2, **extra), dynmoe).train()


def set_up():
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    model_parallel_cuda_manual_seed(1)


@contextlib.contextmanager
def _counted(method):
    """A list that grows with every call of a tensor's method."""
    calls, inner = [], getattr(torch.Tensor, method)
    with mock.patch.object(torch.Tensor, method, lambda tensor: calls.append(1) or inner(tensor)):
        yield calls


def check_steps() -> None:
    import torch.distributed as dist

    from megatron_dynmoe.config import DynMoEConfig
    from megatron_dynmoe.mcore.controllers import Driver
    from tests import toy_controllers

    set_up()
    toy_controllers.install()
    dynmoe, rank = DynMoEConfig(top_p=0.5), dist.get_rank()
    for split in (False, True):  # with sequence parallelism the ranks have different tokens, else the same
        layers = [_tensor_parallel(dynmoe, sequence_parallel=split) for _ in range(2)]
        layers[1].set_layer_number(2)
        driver, router = Driver(dynmoe, tuple(layers)), layers[0].router
        x = _tokens(rank if split else 5)
        padding = torch.zeros(S, B, dtype=torch.bool)
        padding[2] = True
        x[2] = torch.inf
        with mock.patch.object(torch.Tensor, "tolist", side_effect=AssertionError):  # no pass waits for the device
            for layer in layers:
                layer.router(x, padding_mask=padding)
                with torch.no_grad():  # as the first forward of a recompute
                    layer.router(x, padding_mask=padding)
                layer.eval()
                layer.router(x, padding_mask=padding)
                layer.train()
        before = [{name: t.clone() for name, t in (r.router.state(0) | r.router.state(1)).items()} for r in layers]
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce, _counted("tolist") as copies:
            driver.after_step(7)
        assert (reduce.call_count, len(copies)) == (2, 1)  # int64 and float32; for both layers and controllers
        tokens = (S - 1) * B * (2 if split else 1)
        for layer, old in zip(layers, before, strict=True):
            assert int(layer.router.tokens_seen) == int(layer.router.tokens_summed) == tokens
            everything = [_tokens(r) for r in range(2)] if split else [_tokens(5)]
            kept = torch.cat([t[[0, 1, 3, 4, 5]].reshape(-1, D) for t in everything])
            # float32 sums of up to 20 numbers below 4, in another order
            torch.testing.assert_close(layer.router.sum_D, kept.sum(dim=0), rtol=0, atol=20 * 4 * 2**-22)
            assert layer.router.dynmoe.top_p == float(layer.router.top_p) != old["top_p"]
        # A step that was not taken changes nothing, and its counts do not reach the next one.
        settled = {name: t.clone() for name, t in (router.state(0) | router.state(1)).items()}
        router(_tokens(1))
        driver.after_step(8, taken=False)
        assert all(torch.equal(settled[name], t) for name, t in (router.state(0) | router.state(1)).items())
        for layer in layers:
            layer.router(_tokens(1))
        driver.after_step(9)
        assert int(router.tokens_seen) == tokens + S * B * (2 if split else 1)
        events, reports = driver.report()
        assert [event.iteration for event in events] == [7, 7, 9, 9] and reports[0]["top_p"] == router.dynmoe.top_p


def test_two_controllers_step_by_step(tmp_path):
    ranks.call(check_steps, ranks=2, folder=tmp_path)


def check_settings_move_and_clashes_are_refused() -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_dynmoe.config import ConfigError, DynMoEConfig
    from megatron_dynmoe.routers.controller import Controller
    from tests import toy_controllers

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    toy_controllers.install()
    router = layer_of(layer_config(), DynMoEConfig(top_p=0.5)).bfloat16().router
    assert router.weight.dtype == torch.bfloat16
    assert router.top_p.dtype == router.sum_D.dtype == torch.float32 and router.tokens_seen.dtype == torch.int64
    saved = router.state_dict()
    assert not [name for name in saved if name.startswith("counts")]
    for top_p, experts in ((0.0, 1), (1.0, E)):  # what is loaded is routed with
        router.load_state_dict(saved | {"top_p": torch.tensor(top_p)})
        assert router.routing(_tokens(1).view(-1, D)).map_TC.sum(dim=1).unique().tolist() == [experts]
    with torch.device("meta"):
        assert layer_of(layer_config(), DynMoEConfig(top_p=0.25)).router.dynmoe.top_p == 0.25

    def made(name="Mine", sets=(), reads=(), **state):
        return type(name, (Controller,), {"sets": sets, "reads": reads, "state": lambda self: state})

    for rule, gate, words in (
        (
            made("A", number=1.0),
            made("B", number=2.0),
            "controller A has a state 'number', which the controller B has too",
        ),
        (made(weight=1.0), None, "has a state 'weight', a name that the router has already"),
        (made(sets=("topp",), topp=1.0), None, "sets 'topp'; accepted: a setting of its router, gate.*top_p"),
        (made(sets=("top_p",), top_p=torch.ones(())), None, "sets 'top_p'; accepted: with a float"),
        (made(reads=("number",)), None, "reads 'number'; accepted: numbers of that name"),
    ):
        toy_controllers.install(rule=rule, gate=gate)
        with pytest.raises(ConfigError, match=words):
            layer_of(layer_config(), DynMoEConfig())


def test_settings_move_and_clashes_are_refused(tmp_path):
    ranks.call(check_settings_move_and_clashes_are_refused, ranks=1, folder=tmp_path)


def test_a_loss_whose_coefficient_moves_is_asked_for_at_zero(monkeypatch):
    from dataclasses import replace

    from megatron_dynmoe.routers import RULES
    from megatron_dynmoe.routers.auxiliary import losses_of
    from megatron_dynmoe.routers.controller import Controller
    from megatron_dynmoe.routers.router_config import RouterConfig

    assert losses_of(RouterConfig()) == []
    mover = type("Mover", (Controller,), {"sets": ("load_balance_coeff",)})
    monkeypatch.setitem(RULES, "top-p", replace(RULES["top-p"], controller=mover))
    assert [loss.name for loss in losses_of(RouterConfig())] == ["load_balancing_loss"]


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_a_skipped_step_is_known_by_megatrons_sums(interval):
    from megatron_dynmoe.mcore.tracker import RoutingTracker

    tracker = RoutingTracker(num_layers=1, num_experts=1)
    skipped = [1, 1, 0, 1, 0, 0, 1, 0, 1, 1, 1, 0]
    sums = {"advanced iterations": 0, "skipped iterations": 0}
    for iteration, skip in enumerate(skipped, start=1):
        sums["skipped iterations" if skip else "advanced iterations"] += 1
        assert tracker._taken(sums) == (not skip), iteration
        if (
            iteration % interval == 0 and iteration > 1
        ):  # Megatron sets them back, but not after a run's first iteration
            sums |= {"advanced iterations": 0, "skipped iterations": 0}
    assert RoutingTracker(num_layers=1, num_experts=1)._taken({})  # nobody counts: a loop of one's own
