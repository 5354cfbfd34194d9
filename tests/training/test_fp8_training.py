"""FP8 experts in training: layouts, recompute, checkpoints.

With the delayed recipe all micro-batches of a step share their scales, and these are the largest of all ranks.  So a
layout changes neither what is cast nor how, and losses equal those of one rank as they do without FP8.
"""

import json
import math

import pytest

from tests import ranks
from tests.layouts import LAYOUTS, flags, read_scalars

DELAYED = "--moe-fp8-recipe delayed --fp8-amax-history-len 3 --fp8-amax-compute-algo max".split()
NAMES = ("lm loss", "grad-norm", "experts_per_token")
STEPS = 4


def train(argv, places):
    """The training entry; afterwards each rank writes its scales: {"layer linear expert": [values]}."""
    import gc

    from megatron_dynmoe.mcore.fp8_experts import Fp8GroupedMLP
    from megatron_dynmoe.mcore.layer import DynMoELayer

    try:
        code = ranks.pretrain(argv)
    except SystemExit as end:  # --exit-interval
        code = end.code
    found = {}
    for layer in (o for o in gc.get_objects() if isinstance(o, DynMoELayer)):
        if isinstance(layer.experts, Fp8GroupedMLP):
            for name, scales in layer.experts.scales.items():
                for index, expert in enumerate(layer.local_expert_indices):
                    assert scales.scale.dtype == scales.amax_history.dtype
                    state = {key: value.tolist() for key, value in scales.of_expert(index).items()}
                    found.setdefault(f"{layer.layer_number} {name} {expert}", []).append(state)
    import torch.distributed as dist

    (places / f"scales-{dist.get_rank()}.json").write_text(json.dumps(found))
    return code


def run(layout, folder, *extra):
    """Scalars by name and iteration, and the scales of all experts of all ranks.

    With a loss per token the gradient of a token does not depend on how many data-parallel ranks there are; with
    Megatron's usual one it is larger by their number until it is averaged, and so is its amax.
    """
    argv = flags(layout, "--calculate-per-token-loss", "--tensorboard-dir", str(folder / "tb"), *extra)
    count = LAYOUTS[layout][0]
    ranks.call(train, argv, folder, ranks=count, folder=folder)
    scales = {}
    for rank in range(count):
        for name, states in json.loads((folder / f"scales-{rank}.json").read_text()).items():
            scales.setdefault(name, []).extend(states)
    return {name: read_scalars(folder / "tb", name) for name in NAMES}, scales


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    """Saved half way, never interrupted."""
    folder = tmp_path_factory.mktemp("serial")
    places = ["--save", str(folder / "save"), "--save-interval", str(STEPS // 2), "--exit-interval", str(STEPS)]
    return *run("serial", folder, *DELAYED, *places), folder / "save"


def resume(save, end=STEPS):
    return ["--load", str(save), "--ckpt-step", str(STEPS // 2), "--exit-interval", str(end)]


def test_it_is_fp8(serial, tmp_path):
    plain, none = run("serial", tmp_path, "--exit-interval", str(STEPS))
    scalars, scales, _ = serial
    assert not none and len(scales) == 3 * 2 * 4  # MoE layers, linear layers, experts
    for states in scales.values():
        ((state),) = states
        assert all(scale != 1 for scale in state["scale"])
        assert state["amax_history"][0] == [0, 0, 0] and all(amax > 0 for amax in state["amax_history"][-1])
    gaps = [abs(scalars["lm loss"][i] / plain["lm loss"][i] - 1) for i in range(1, STEPS + 1)]
    assert 1e-5 < max(gaps) < 0.02  # other numbers, and no other training


@pytest.mark.parametrize("layout", ["dp2", "ep2", "tp2-sp", "recompute", "recompute-moe"])
def test_layout_equals_serial_from_its_checkpoint(serial, tmp_path, layout):
    """From the scales that were saved: with others the first step would differ."""
    wanted, wanted_scales, save = serial
    got, scales = run(layout, tmp_path, *DELAYED, *resume(save))
    for name in NAMES:
        assert sorted(got[name]) == list(range(STEPS // 2 + 1, STEPS + 1))
        for iteration, value in got[name].items():
            # Computed again is computed alike.  Sums in another order move an operand now and then to the next number
            # of FP8, an eighth away, and so, a step later, a token in a thousand to another expert.
            off = 0 if "recompute" in layout else 2e-3 if iteration == STEPS // 2 + 1 else 2e-2
            assert math.isclose(value, wanted[name][iteration], rel_tol=off), (name, iteration)
    assert sorted(scales) == sorted(wanted_scales)
    for name, states in scales.items():
        assert all(state == states[0] for state in states), name  # on every rank that holds the expert
        # the largest gradient is one number, at the end of all those roundings
        for which, off in enumerate((0.02, 1e-3, 0.1)):
            of_serial = wanted_scales[name][0]["scale"][which]
            assert math.isclose(states[0]["scale"][which], of_serial, rel_tol=off), (name, which)


def test_a_checkpoint_goes_to_other_experts_and_back(serial, tmp_path):
    """bfloat16 experts resume from FP8 ones, and FP8 ones from those; scales start at 1 then, as in a new model."""
    *_, save = serial
    place = ["--save", str(tmp_path / "save"), "--save-interval", "2"]
    plain, none = run("ep2", tmp_path / "plain", *resume(save), *place)
    assert not none and sorted(plain["lm loss"]) == [3, 4]
    where = ["--load", str(tmp_path / "save"), "--exit-interval", "6"]
    back, scales = run("ep2", tmp_path / "back", *DELAYED, *where, "--bf16", "--no-load-optim", "--no-load-rng")
    assert sorted(back["lm loss"]) == [5, 6] and all(math.isfinite(loss) for loss in back["lm loss"].values())
    assert len(scales) == 24 and all(scale != 1 for (state,) in scales.values() for scale in state["scale"][:2])


def test_the_export_of_fp8_experts_is_that_of_others(serial, tmp_path):
    """The same keys, shapes and dtypes as of the model that went on without FP8; scales are left behind."""
    from safetensors import safe_open

    from megatron_dynmoe.hf.export import export

    *_, save = serial
    run("serial", tmp_path / "plain", *resume(save, 3), "--save", str(tmp_path / "save"), "--save-interval", "1")
    found = []
    for number, (folder, iteration) in enumerate(((save, STEPS // 2), (tmp_path / "save", 3))):
        export(folder, tmp_path / f"out{number}", iteration=iteration, progress=False)
        described = {}
        for file in (tmp_path / f"out{number}").glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                    described[key] = (tensors.get_tensor(key).shape, tensors.get_tensor(key).dtype)
        found.append(described)
    assert found[0] == found[1] and len(found[0]) > 40


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "rowwise"])
def test_other_recipes_train_on_two_ranks(serial, tmp_path, recipe):
    """They resume from the delayed recipe's checkpoint, whose scales they pass by."""
    wanted, _, save = serial
    got, none = run("ep2", tmp_path, "--moe-fp8-recipe", recipe, *resume(save))
    assert not none
    for iteration in (3, 4):  # from the same weights; a tenth of what FP8 changes in the experts' outputs
        assert got["lm loss"][iteration] != wanted["lm loss"][iteration]
        assert math.isclose(got["lm loss"][iteration], wanted["lm loss"][iteration], rel_tol=1e-2)
