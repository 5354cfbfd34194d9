"""The same entry trains the baselines: a dense model, Switch, GShard, and a bfloat16 model."""

import pytest

from tests import ranks
from tests.layouts import flags, read_metrics, read_scalars


def train(folder, *extra):
    places = ["--tensorboard-dir", str(folder / "tb"), "--moe-metrics-file", str(folder / "m.jsonl")]
    ranks.call(ranks.pretrain, flags("serial", *places, "--exit-interval", "12", *extra), ranks=1, folder=folder)
    assert_learns(folder)
    return read_metrics(folder / "m.jsonl")


@pytest.mark.parametrize(("preset", "experts"), [("switch", 1), ("gshard", 2)])
def test_fixed_k_presets(tmp_path, preset, experts):
    records = train(tmp_path, "--moe-preset", preset)  # the last preset counts
    assert {record["experts_per_token"] for record in records} == {experts}


def test_dense_model(tmp_path):
    moe = "--num-experts --moe-ffn-hidden-size --moe-shared-expert-intermediate-size --moe-layer-freq --moe-preset "
    moe += "--moe-z-loss-coeff --moe-token-dispatcher-type"
    words = flags("serial", "--exit-interval", "12", "--tensorboard-dir", str(tmp_path / "tb"))
    dropped = {position + offset for position, word in enumerate(words) if word in moe.split() for offset in (0, 1)}
    dense = [word for position, word in enumerate(words) if position not in dropped]
    ranks.call(ranks.pretrain, dense, ranks=1, folder=tmp_path)
    assert_learns(tmp_path)


def assert_learns(folder):
    losses = read_scalars(folder / "tb", "lm loss")
    # mock data counts upwards in each sequence, so a dozen steps teach it something whatever the router
    assert losses[12] < losses[1] - 0.2


def test_bfloat16(tmp_path):
    records = train(tmp_path, "--bf16")
    assert all(1 < record["experts_per_token"] < 4 for record in records)
