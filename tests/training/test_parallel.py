"""Parallel equals serial, and a checkpoint of one layout loads in another.

A relay: each layout loads what the one before it saved, trains two iterations and hands on.  A single rank that is
never interrupted runs beside it.  Losses, auxiliary losses and gradient norm agree at every iteration, so each layout
computes the same step, and each save and each load carries weights, optimizer state and position exactly.
"""

import math

import pytest

from tests import ranks
from tests.layouts import DISTRIBUTED_OPTIMIZER, LAYOUTS, flags, read_scalars

STEPS = 2
SCALARS = ("lm loss", "grad-norm", "load_balancing_loss", "entropy_loss", "z_loss", "experts_per_token")


def run(layout, *extra, folder):
    """Train one leg; scalars by name and iteration."""
    argv = flags(layout, "--tensorboard-dir", str(folder / "tb"), *extra)
    ranks.call(ranks.pretrain, argv, ranks=(LAYOUTS | DISTRIBUTED_OPTIMIZER)[layout][0], folder=folder)
    return {name: read_scalars(folder / "tb", name) for name in SCALARS}


def relay(layouts, root):
    """Each layout's scalars; the checkpoint lies in ``root / "checkpoint"``."""
    checkpoint, results = root / "checkpoint", {}
    for leg, layout in enumerate(layouts, start=1):
        end = str(STEPS * leg)
        where = ("--save", str(checkpoint), "--load", str(checkpoint), "--save-interval", end, "--exit-interval", end)
        results[layout] = run(layout, *where, folder=root / layout)
    return results


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    """One rank, never interrupted, one iteration further than the longest relay."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return run("serial", "--exit-interval", str(STEPS * len(LAYOUTS) + 1), folder=folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    root = tmp_path_factory.mktemp("relay")
    return relay(LAYOUTS, root), root / "checkpoint"


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    return relay(DISTRIBUTED_OPTIMIZER, tmp_path_factory.mktemp("relay-distopt"))


def assert_equal(got, serial, first, last):
    for name in SCALARS:
        assert sorted(got[name]) == list(range(first, last + 1))
        for iteration, value in got[name].items():
            # Layouts differ in the order of float32 sums only. A value is the end of some hundred rounded operations
            # (4 layers, sums of 32 to 96 terms, up to 28 steps before it), whose relative errors of 2^-24 add up like
            # a random walk, with the gradient norm a few times less well conditioned than the loss: 2^-24 * 10 * 16.
            assert math.isclose(value, serial[name][iteration], rel_tol=2**-24 * 160), (name, iteration)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_serial(plain, serial, layout):
    results, _ = plain
    first = STEPS * list(LAYOUTS).index(layout) + 1
    assert_equal(results[layout], serial, first, first + STEPS - 1)


@pytest.mark.parametrize("layout", DISTRIBUTED_OPTIMIZER)
def test_distributed_optimizer_equals_serial(distributed, serial, layout):
    first = STEPS * list(DISTRIBUTED_OPTIMIZER).index(layout) + 1
    assert_equal(distributed[layout], serial, first, first + STEPS - 1)


def test_weights_go_from_one_optimizer_to_the_other(plain, serial, tmp_path):
    _, checkpoint = plain
    last = STEPS * len(LAYOUTS)
    where = ("--load", str(checkpoint), "--no-load-optim", "--no-load-rng", "--exit-interval", str(last + 1))
    assert_equal(run("ep2-distopt", *where, folder=tmp_path), serial, last + 1, last + 1)


def test_routing_is_ragged_in_this_test(serial):
    assert all(1 < value < 4 and value != round(value) for value in serial["experts_per_token"].values())
