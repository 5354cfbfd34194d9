"""Learned thresholds on sigmoid scores: expert and tensor parallelism compute what one rank does."""

import math

import pytest

from tests import ranks
from tests.layouts import LAYOUTS, MODEL, read_metrics, read_scalars

ITERATIONS = 3
# The vector of the thresholds lies on every rank, its gradient is summed over those that share the tokens.
ROUTER = "--moe-gate sigmoid --moe-rule threshold --moe-threshold 0.55 --moe-learned-thresholds".split()
ROUTER += (
    "--no-moe-threshold-keep-best --moe-normalize-weights --moe-aux-loss-coeff 1e-2 --moe-z-loss-coeff 1e-3".split()
)
SCALARS = ("lm loss", "grad-norm", "load_balancing_loss", "z_loss", "experts_per_token", "unrouted_tokens", "threshold")


def run(layout, *extra, folder):
    model = MODEL[: MODEL.index("--moe-preset")]
    argv = [*model, *ROUTER, *LAYOUTS[layout][1].split(), "--tensorboard-dir", str(folder / "tb"), *extra]
    ranks.call(ranks.pretrain, argv, ranks=LAYOUTS[layout][0], folder=folder)
    return {name: read_scalars(folder / "tb", name) for name in SCALARS}


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    """One rank, which saves after its first step and goes on."""
    folder = tmp_path_factory.mktemp("serial")
    save = ("--save", str(folder / "save"), "--save-interval", "1", "--exit-interval", str(ITERATIONS))
    save += ("--moe-metrics-file", str(folder / "metrics.jsonl"))
    return run("serial", *save, folder=folder), folder / "save"


@pytest.mark.parametrize("layout", ["ep2", "tp2-sp"])
def test_a_layout_goes_on_as_one_rank_does(layout, serial, tmp_path):
    wanted, save = serial
    where = ("--load", str(save), "--ckpt-step", "1", "--exit-interval", str(ITERATIONS))
    got = run(layout, *where, folder=tmp_path)
    for name in SCALARS:
        assert sorted(got[name]) == list(range(2, ITERATIONS + 1))
        for iteration, value in got[name].items():
            # float32 sums in another order: see tests/training/test_parallel.py
            assert math.isclose(value, wanted[name][iteration], rel_tol=2**-24 * 160), (name, iteration)
    assert all(1 < k < 4 for k in wanted["experts_per_token"].values())
    assert all(0 < share < 1 for share in wanted["unrouted_tokens"].values())


def test_thresholds_are_logged_and_move(serial):
    scalars, save = serial
    records = read_metrics(save.parent / "metrics.jsonl")
    for record in records:
        by_layer = record["thresholds_by_layer"]
        assert sorted(by_layer) == ["0", "2", "3"]  # layer 1 is dense
        for least, mean, most in by_layer.values():
            assert 0 < least < mean < most < 1
        means = [mean for _, mean, _ in by_layer.values()]
        assert record["threshold"] == pytest.approx(sum(means) / 3)
        assert scalars["threshold"][record["iteration"]] == pytest.approx(record["threshold"])
    # Adam's first step is the learning rate for each parameter: up to 1e-3 sigmoid' = 2.5e-4 of a threshold.
    assert 0 < abs(records[-1]["threshold"] - 0.55) < ITERATIONS * 2.5e-4 * 1.1
