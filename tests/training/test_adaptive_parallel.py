"""DynMoE under every layout: parallel equals serial, over updates that remove and add experts.

The relay of test_parallel.py with Top-Any routing.  The thresholds of two experts are set so high at the start
that nobody visits them: the first update removes them and adds one, later updates add more, in windows that begin
under one layout and end under another.  Besides losses, masks, embeddings and thresholds are compared: bit by bit over
the ranks of a run, and with the single rank.
"""

import gc
import json
import math

import pytest
import torch

from tests import ranks
from tests.layouts import DISTRIBUTED_OPTIMIZER, LAYOUTS, MODEL, read_scalars

STEPS = 2
ADAPTIVE = """
    --moe-preset dynmoe --num-experts 8 --moe-initial-experts 4 --moe-record-from 1 --moe-update-at 3
    --moe-update-period 4 --moe-aux-loss-coeff 1e-2 --moe-efficiency-coeff 1e-2
""".split()
PLAIN = ["--moe-added-expert-init", "fresh"]
# The second relay: what the first has not.
SHARDED = "--moe-added-expert-init copy --moe-max-added-experts 2 --moe-residual --moe-train-cosine-scale".split()
SCALARS = ("lm loss", "grad-norm", "diversity_loss", "simplicity_loss", "efficiency_loss", "load_balancing_loss")
LAYOUTS_HERE = LAYOUTS | DISTRIBUTED_OPTIMIZER
# What a row on the wire is, and whether shared experts run behind it, adaptation does not see.
PLAIN_LEGS = [name for name in LAYOUTS if not name.endswith(("-rank", "-auto", "overlap"))]
SHARDED_LEGS = ["serial-distopt", "ep2-distopt", "dp2-overlap", "pp2-distopt", "tp2-ep2-distopt"]


def model_flags():
    """MODEL without what belongs to another router."""
    flags = list(MODEL)
    for flag in ("--moe-preset", "--num-experts", "--moe-z-loss-coeff"):
        at = flags.index(flag)
        del flags[at : at + 2]
    return flags


def pretrain(argv, out):
    """The training entry; what each rank's routers hold at the end goes to ``out``."""
    from dataclasses import replace

    from megatron_dynmoe.mcore.controllers import Driver
    from megatron_dynmoe.routers import RULES

    thresholds = torch.zeros(8)
    thresholds[[0, 4]] = torch.tensor([3.0, 0.95])
    thresholds[2] = 0.1
    start = replace(RULES["top-any"], parameters=lambda *_: {"thresholds": thresholds.clone()})
    RULES["top-any"] = start
    check_every_update()
    try:
        return ranks.pretrain(argv)
    finally:
        (driver,) = [thing for thing in gc.get_objects() if isinstance(thing, Driver)]
        names = ("experts_mask", "weight", "thresholds", "recorded_rows_E", "recorded_sums_BD", "schedule")
        state = {
            layer.router.layer_number - 1: {name: getattr(layer.router, name).detach().clone() for name in names}
            for layer in driver.layers
        }
        torch.save(state, out / f"state{torch.distributed.get_rank()}.pt")


def check_every_update():
    """After each update: the optimizer's copy of a new slot is the model's, and its moments are zero."""
    from megatron_dynmoe.mcore.slots import Slice, expert_weights, main_copies
    from megatron_dynmoe.routers.adaptation import Adaptation

    update = Adaptation._update

    def checked(self, state, step):
        event, layer = update(self, state, step), step.experts.layer
        for slot in event.added:
            new = [Slice(layer.router.weight, slot), Slice(layer.router.thresholds, slot)]
            if slot in layer.local_expert_indices:
                new += expert_weights(layer.experts, slot - layer.local_expert_indices[0])
            for where in new:
                check_slice(where, list(main_copies(step.experts.optimizer, where.parameter)))
        return event

    Adaptation._update = checked


def check_slice(where, copies):
    assert len(copies) <= 1
    begin, end = where.extent
    for main, moments, first in copies:
        low, high = max(begin, first), min(end, first + main.numel())
        if low >= high:
            continue
        mine, held = where.data.flatten()[low - begin : high - begin], main.flatten()[low - first : high - first]
        assert torch.equal(mine, held.to(mine.dtype))
        assert len(moments) == 2  # Adam's
        for moment in moments:
            assert (moment.flatten()[low - first : high - first] == 0).all()


def run(layout, *extra, folder):
    """Train one leg: scalars by name and iteration, changes of experts, router states by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    count, layout_flags = LAYOUTS_HERE[layout]
    logs = ["--tensorboard-dir", str(folder / "tb"), "--moe-metrics-file", str(folder / "metrics.jsonl")]
    argv = [*model_flags(), *ADAPTIVE, *layout_flags.split(), *logs, *extra]
    ranks.call(pretrain, argv, folder, ranks=count, folder=folder)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "scalars": {name: read_scalars(folder / "tb", name) for name in (*SCALARS, "threshold", "unrouted_tokens")},
        "changes": [change for record in records for change in record["expert_changes"]],
        "active": {record["iteration"]: record["active_experts_by_layer"] for record in records},
        "states": [torch.load(folder / f"state{rank}.pt") for rank in range(count)],
    }


def relay(legs, extra, root):
    checkpoint, results = root / "checkpoint", {}
    for leg, layout in enumerate(legs, start=1):
        end = str(STEPS * leg)
        where = ("--save", str(checkpoint), "--load", str(checkpoint), "--save-interval", end, "--exit-interval", end)
        results[layout] = run(layout, *where, *extra, folder=root / layout)
    return results


def single(legs, extra, tmp_path_factory):
    return run("serial", *extra, "--exit-interval", str(STEPS * len(legs)), folder=tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return single(PLAIN_LEGS, PLAIN, tmp_path_factory), relay(PLAIN_LEGS, PLAIN, tmp_path_factory.mktemp("relay"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    serial = single(SHARDED_LEGS, SHARDED, tmp_path_factory)
    return serial, relay(SHARDED_LEGS, SHARDED, tmp_path_factory.mktemp("relay-distopt"))


def assert_equal(got, serial, first):
    last = first + STEPS - 1
    for name, values in got["scalars"].items():
        assert sorted(values) == list(range(first, last + 1))
        for iteration, value in values.items():
            # As in test_parallel.py, where the bound is derived: 10 * 16 roundings.
            expected = serial["scalars"][name][iteration]
            assert math.isclose(value, expected, rel_tol=2**-24 * 160, abs_tol=1e-9), (name, iteration)
        assert got["active"][first] == serial["active"][first]
    expected = [change for change in serial["changes"] if first <= change["iteration"] <= last]
    assert got["changes"] == expected


def assert_ranks_hold_the_same(states):
    for state in states:
        for other in states:
            for layer in state.keys() & other.keys():  # pipeline stages hold different layers
                for name, value in state[layer].items():
                    assert torch.equal(value, other[layer][name]), (layer, name)


@pytest.mark.parametrize("layout", PLAIN_LEGS)
def test_layout_equals_serial(plain, layout):
    serial, results = plain
    assert_equal(results[layout], serial, STEPS * PLAIN_LEGS.index(layout) + 1)
    assert_ranks_hold_the_same(results[layout]["states"])


@pytest.mark.parametrize("layout", SHARDED_LEGS)
def test_distributed_optimizer_equals_serial(sharded, layout):
    serial, results = sharded
    assert_equal(results[layout], serial, STEPS * SHARDED_LEGS.index(layout) + 1)
    assert_ranks_hold_the_same(results[layout]["states"])


def test_the_relays_end_with_the_routers_of_the_single_rank(plain, sharded):
    for (serial, results), last in ((plain, PLAIN_LEGS[-1]), (sharded, SHARDED_LEGS[-1])):
        merged = {layer: state for rank in results[last]["states"] for layer, state in rank.items()}
        for layer, state in serial["states"][0].items():
            for name in ("experts_mask", "recorded_rows_E", "schedule"):
                assert torch.equal(merged[layer][name], state[name]), (layer, name)
            for name in ("weight", "thresholds"):
                # Adam divides a gradient by its own size: a step of lr = 1e-3 can differ by the relative error of the
                # smallest gradients, so each of up to 24 steps by 1e-3 times some 1e-4.
                assert torch.allclose(merged[layer][name], state[name], rtol=1e-5, atol=4e-6), (layer, name)


def test_there_were_removals_and_additions(plain, sharded):
    for serial, _ in (plain, sharded):
        updates = {change["iteration"] for change in serial["changes"] if change["removed"] or change["added"]}
        assert len(updates) >= 2
        assert any(change["removed"] for change in serial["changes"])
        assert any(change["added"] for change in serial["changes"])
    assert any(len(change["added"]) == 2 for change in sharded[0]["changes"])


def test_bfloat16_keeps_the_router_in_float32(tmp_path):
    """Mixed precision, sharded optimizer, overlapped gather: the checks of every update run here too."""
    result = run("dp2-overlap", "--bf16", *SHARDED, "--exit-interval", "8", folder=tmp_path)
    assert sum(len(change["added"]) for change in result["changes"]) > 0
    assert_ranks_hold_the_same(result["states"])
    for state in result["states"][0].values():
        assert {state[name].dtype for name in ("weight", "thresholds", "recorded_sums_BD")} == {torch.float32}
        assert not torch.equal(state["thresholds"], state["thresholds"].bfloat16().float())
