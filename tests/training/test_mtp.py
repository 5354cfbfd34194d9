"""Layers of multi-token prediction are dynamic in every layout: parallel equals serial, a checkpoint moves.

The relay of test_parallel.py, with two layers of multi-token prediction behind the decoder: on a stage with other
layers, alone on a virtual stage, and on a stage that is neither the first nor the last.
"""

import json
import math

import pytest

from tests import ranks
from tests.layouts import MODEL, read_scalars

STEPS = 2
OWN = "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|t|tt|mmL"
ALONE = "--pipeline-model-parallel-size 3 --pipeline-model-parallel-layout Et|t|t|t|mm|L"
SERIAL = (1, "")
# name -> (ranks, flags); a checkpoint is handed on in this order
LAYOUTS = {
    "ep2": (2, "--expert-model-parallel-size 2"),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "own virtual stage": (2, OWN),
    "stage without loss": (3, ALONE),
}
SHARDED = {
    "pp2, sharded": (2, "--pipeline-model-parallel-size 2 --use-distributed-optimizer"),
    "ep2, sharded": (2, "--expert-model-parallel-size 2 --use-distributed-optimizer"),
}
LOSSES = ("lm loss", "mtp_1 loss", "mtp_2 loss", "grad-norm")
SCALARS = (*LOSSES, "load_balancing_loss", "z_loss", "experts_per_token")
# What keeps state between layers (MoE++: logits), here without any loss of a router and with one matrix for embedding
# and output; and what keeps state between steps (DynMoE: experts are removed and added).
PLUS_PLUS = "--moe-preset moe-plus-plus --moe-tau 0.5 --moe-aux-loss-coeff 0"
ADAPTIVE = """
    --moe-preset dynmoe --num-experts 8 --moe-initial-experts 4 --moe-record-from 1 --moe-update-at 2
    --moe-update-period 3 --moe-added-expert-init fresh
"""


def model(*, without: tuple[str, ...] = ()) -> list[str]:
    """MODEL with multi-token prediction, and batches that three pipeline stages can share out."""
    flags = list(MODEL)
    for name in (*without, "--global-batch-size"):
        at = flags.index(name)
        del flags[at : at + 2]
    return [*flags, "--global-batch-size", "12", "--mtp-num-layers", "2"]


def run(layout, flags, *, end, folder, load=None, save=None, names=SCALARS):
    """Train up to iteration ``end``, saving every second one: scalars by name and iteration, and metrics records."""
    count, words = layout
    places = ["--tensorboard-dir", str(folder / "tb"), "--moe-metrics-file", str(folder / "metrics.jsonl")]
    places += [] if load is None else ["--load", str(load[0]), "--ckpt-step", str(load[1])]
    places += [] if save is None else ["--save", str(save), "--save-interval", str(STEPS)]
    argv = [*flags, *words.split(), *places, "--exit-interval", str(end)]
    ranks.call(ranks.pretrain, argv, ranks=count, folder=folder)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name: read_scalars(folder / "tb", name) for name in names} | {"records": records}


def relay(legs, checkpoint, root):
    """Each leg goes on with what the one before saved, the first with iteration 2 of ``checkpoint``."""
    results, load = {}, (checkpoint, STEPS)
    for name, layout in legs.items():
        end = load[1] + STEPS
        results[name] = run(layout, model(), end=end, folder=root / name, load=load, save=root / "checkpoint")
        load = (root / "checkpoint", end)
    return results


def assert_equal(got, serial, first, last):
    """Scalars as in tests/training/test_parallel.py, where the bound is derived: 10 * 16 roundings."""
    for name in got.keys() - {"records"}:
        assert sorted(got[name]) == list(range(first, last + 1)), name
        for iteration, value in got[name].items():
            assert math.isclose(value, serial[name][iteration], rel_tol=2**-24 * 160), (name, iteration)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """One rank, never interrupted, and its checkpoints."""
    folder = tmp_path_factory.mktemp("serial")
    return run(SERIAL, model(), end=STEPS * (1 + len(LAYOUTS)), folder=folder, save=folder / "save"), folder / "save"


@pytest.fixture(scope="module")
def results(start, tmp_path_factory):
    root = tmp_path_factory.mktemp("sharded")
    run((1, "--use-distributed-optimizer"), model(), end=STEPS, folder=root, save=root / "save")
    sharded = relay(SHARDED, root / "save", root)
    return relay(LAYOUTS, start[1], tmp_path_factory.mktemp("relay")) | sharded


@pytest.mark.parametrize("layout", [*LAYOUTS, *SHARDED])
def test_layout_equals_serial(results, start, layout):
    order = list(LAYOUTS if layout in LAYOUTS else SHARDED)
    first = STEPS * (order.index(layout) + 1) + 1
    assert_equal(results[layout], start[0], first, first + STEPS - 1)


def test_their_layers_route_as_the_preset_says(start):
    """Top-p is ragged: a layer of stock top-k would visit two experts with each token, and would not be counted."""
    by_layer = start[0]["records"][-1]["experts_per_token_by_layer"]
    assert list(by_layer) == ["0", "2", "3", "4", "5"]  # layer 1 is dense; 4 and 5 are those behind the decoder
    assert all(1 < by_layer[layer] < 4 and by_layer[layer] != 2 for layer in ("4", "5"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_metrics_file_has_their_losses(results, layout):
    """Of each iteration alone, although Megatron counts a run's first one again in its second report."""
    records = results[layout]["records"]
    for name in ("lm", "mtp_1", "mtp_2"):
        scalars = results[layout][f"{name} loss"]
        for record in records:
            # A sum, a difference and a division in float32 beside the same.
            assert math.isclose(record[f"{name}_loss"], scalars[record["iteration"]], rel_tol=2**-21)


@pytest.mark.parametrize("preset", [PLUS_PLUS, ADAPTIVE], ids=["logits are carried", "experts adapt"])
def test_presets_with_state_between_layers_or_steps(preset, tmp_path):
    flags = [*model(without=("--moe-preset", "--moe-z-loss-coeff")), *preset.split()]
    if preset is PLUS_PLUS:
        flags.remove("--untie-embeddings-and-output-weights")
    place = {"end": 3 * STEPS, "names": LOSSES}
    serial = run(SERIAL, flags, folder=tmp_path / "serial", save=tmp_path / "save", **place)
    got = run((3, ALONE), flags, folder=tmp_path / "alone", load=(tmp_path / "save", STEPS), **place)
    assert_equal(got, serial, STEPS + 1, 3 * STEPS)
    layers = {"0", "2", "3", "4", "5"}
    assert got["records"][-1]["experts_per_token_by_layer"].keys() == layers
    if preset is ADAPTIVE:
        active = [one["records"][-1]["active_experts_by_layer"] for one in (got, serial)]
        assert active[0] == active[1]
        assert active[0].keys() == layers
        changed = {change["layer"] for record in got["records"] for change in record["expert_changes"]}
        assert {4, 5} <= changed


def test_an_export_leaves_them_out_by_name(start, tmp_path, capsys):
    """The decoder is whole: the export refuses tensors that are missing, and others that it has no place for."""
    from megatron_dynmoe.programs import export_hf

    assert export_hf.main(["--checkpoint", str(start[1]), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "left out: the layers of multi-token prediction" in said
    assert "mtp.layers.0." in said and "mtp.layers.1." in said
