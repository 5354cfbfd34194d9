"""MoE++ under every layout: parallel equals serial over 20 steps, with gating residuals and zero-computation experts.

Every layout loads what one rank saved after one step and trains 20 steps on; that rank goes on beside them.  Losses,
gradient norm, and the shares of free experts agree at every step.
"""

import math

import pytest

from tests import ranks
from tests.layouts import DISTRIBUTED_OPTIMIZER, LAYOUTS, MODEL, read_scalars

STEPS = 20
# The dense layer in the middle of MODEL passes the logits on.
ROUTER = """
    --moe-preset moe-plus-plus --num-experts 4 --moe-router-topk 2 --moe-tau 0.5 --moe-z-loss-coeff 1e-3
    --global-batch-size 4
""".split()
SCALARS = ("lm loss", "grad-norm", "load_balancing_loss", "z_loss", "experts_per_token")
SCALARS += ("constant_tokens", "copy_tokens", "zero_tokens")


def flags(layout):
    """The command line of one layout."""
    model = list(MODEL)
    for flag in ("--moe-preset", "--num-experts", "--moe-z-loss-coeff", "--global-batch-size"):
        at = model.index(flag)
        del model[at : at + 2]
    return [*model, *ROUTER, *(LAYOUTS | DISTRIBUTED_OPTIMIZER)[layout][1].split()]


def run(layout, *extra, folder):
    argv = [*flags(layout), "--tensorboard-dir", str(folder / "tb"), *extra]
    ranks.call(ranks.pretrain, argv, ranks=(LAYOUTS | DISTRIBUTED_OPTIMIZER)[layout][0], folder=folder)
    return {name: read_scalars(folder / "tb", name) for name in SCALARS}


def save_once(layout, folder):
    run(layout, "--save", str(folder / "checkpoint"), "--save-interval", "1", "--exit-interval", "1", folder=folder)
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The checkpoint after one step, of the plain optimizer and of the distributed one."""
    plain, sharded = (tmp_path_factory.mktemp(name) for name in ("plain", "sharded"))
    return {False: save_once("serial", plain), True: save_once("serial-distopt", sharded)}


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    """One rank, never interrupted."""
    return run("serial", "--exit-interval", str(STEPS + 1), folder=tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.parametrize("layout", [*LAYOUTS, *DISTRIBUTED_OPTIMIZER])
def test_layout_equals_serial(start, serial, layout, tmp_path):
    load = ("--load", str(start[layout in DISTRIBUTED_OPTIMIZER]), "--exit-interval", str(STEPS + 1))
    got = run(layout, *load, folder=tmp_path)
    for name in SCALARS:
        assert sorted(got[name]) == list(range(2, STEPS + 2))
        for iteration, value in got[name].items():
            # As in test_parallel.py, where the bound is derived: 10 * 16 roundings.
            assert math.isclose(value, serial[name][iteration], rel_tol=2**-24 * 160), (name, iteration)


def test_tokens_go_to_every_kind_of_expert(serial):
    for name in ("constant_tokens", "copy_tokens", "zero_tokens"):
        assert all(0 < value < 1 for value in serial[name].values())
    assert all(0.5 < value < 2 for value in serial["experts_per_token"].values())


@pytest.mark.parametrize("layout", ["vpp2", "tp2-ep2"])
def test_what_other_layouts_save_one_rank_loads(start, serial, layout, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    where = ("--load", str(start[False]), "--save", str(checkpoint), "--save-interval", "2", "--exit-interval", "2")
    run(layout, *where, folder=tmp_path / "saves")
    got = run("serial", "--load", str(checkpoint), "--exit-interval", "3", folder=tmp_path / "loads")
    for name in SCALARS:
        assert math.isclose(got[name][3], serial[name][3], rel_tol=2**-24 * 160), name


def test_bfloat16_pipelines_carry_the_same_logits(start, tmp_path):
    """Logits take two channels there; what crosses a stage's boundary is what stays within one."""
    load = ("--bf16", "--load", str(start[False]), "--no-load-optim", "--no-load-rng", "--exit-interval", "4")
    whole, stages = (run(layout, *load, folder=tmp_path / layout) for layout in ("serial", "vpp2"))
    for name in SCALARS:
        for iteration, value in stages[name].items():
            # The same operations in the same precision; only float32 sums over parameters differ in order.
            assert math.isclose(value, whole[name][iteration], rel_tol=2**-24 * 160), (name, iteration)
