"""FP8 experts by Transformer Engine: each preset with each recipe, beside bfloat16; checkpoints; recomputation."""

import math
import shutil

import pytest

from megatron_dynmoe.config import PRESETS
from megatron_dynmoe.programs import export_hf
from tests import ranks
from tests.te import fp8_layers
from tests.te.runs import RANKS, SCALARS, command, make_data, train

SAVED, END = 2, 4
PADDED = "--moe-router-padding-for-quantization"
RECIPES = {
    "bfloat16": "",
    "delayed": "--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 8 --fp8-amax-compute-algo max "
    + PADDED,
    "tensorwise": f"--fp8-format hybrid --fp8-recipe tensorwise {PADDED}",
    "blockwise": f"--fp8-format e4m3 --fp8-recipe blockwise {PADDED}",
}
RECOMPUTED = {
    "delayed, moe": "--recompute-granularity selective --recompute-modules moe",
    "delayed, full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "blockwise, full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "blockwise, moe_act and layernorm": "--recompute-granularity selective --recompute-modules moe_act layernorm",
}
REFUSED = {
    "delayed, activations recomputed": (
        f"{RECIPES['delayed']} --recompute-granularity selective --recompute-modules moe_act",
        "Delayed scaling does not support moe_act",
    ),
    "delayed, first and last layers in bfloat16": (
        f"{RECIPES['delayed']} --first-last-layers-bf16",
        "Delayed scaling does not support first / last layer in BF16",
    ),
    "added experts in FP8 weights": (
        f"{RECIPES['blockwise']} --fp8-param-gather --moe-preset dynmoe --moe-added-expert-init copy",
        "--fp8-param-gather is True, which a dynamic MoE layer cannot serve: --moe-added-expert-init copy",
    ),
    "torch's experts": (f"{RECIPES['blockwise']} --moe-expert-backend torch", "an FP8 of its own, --moe-fp8-recipe"),
}
# Sums in another order, over other ranks, cast to three bits each: a part in a thousand of the loss.
ANOTHER_ORDER = 2e-3


def test_layers_of_each_preset_and_recipe(tmp_path):
    ranks.call(fp8_layers.check_layers, list(PRESETS), ranks=2, folder=tmp_path)


def test_scales_move_with_their_experts(tmp_path):
    ranks.call(fp8_layers.check_scales_move_with_their_experts, tmp_path, ranks=2, folder=tmp_path / "ranks")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with delayed scales, in two micro-batches a step: command line, folder of checkpoints, numbers."""
    folder = tmp_path_factory.mktemp("whole")
    argv = command(
        "moe_plus_plus_1b", make_data(folder), folder / "save", "--moe-shared-expert-intermediate-size", "64"
    )
    long = [*argv, *RECIPES["delayed"].split(), "--save-interval", str(SAVED), "--exit-interval", str(END)]
    return argv, folder / "save", train(long, folder)


@pytest.fixture(scope="module")
def resumed(whole, tmp_path_factory):
    """``resumed(recipe, flags)``: two iterations from the saved one, each combination once."""
    argv, save, _ = whole
    done = {}

    def run(recipe: str, flags: str = ""):
        if (recipe, flags) not in done:
            folder = tmp_path_factory.mktemp("resumed")
            where = ["--load", save, "--ckpt-step", SAVED, "--save", folder / "save", "--exit-interval", END]
            words = [*argv, *RECIPES[recipe].split(), *flags.split(), *map(str, where)]
            done[recipe, flags] = train(words, folder)
        return done[recipe, flags]

    return run


def after(numbers, iteration):
    return {name: {i: value for i, value in numbers[name].items() if i > iteration} for name in SCALARS}


def assert_close(got, wanted, tolerance, choices=0.01):
    # of 512 choices a step, a token's in a layer, one in a hundred is near enough to another
    for name, limit in (("lm loss", tolerance), ("experts_per_token", choices)):
        assert got[name].keys() == wanted[name].keys()
        for iteration, value in got[name].items():
            assert math.isclose(value, wanted[name][iteration], rel_tol=limit), (name, iteration)


def test_delayed_scales_resume(whole, resumed):
    """The same numbers; and nearly the same with another expert parallelism, where experts change ranks."""
    wanted = after(whole[2], SAVED)
    assert resumed("delayed") == wanted
    assert_close(resumed("delayed", "--expert-model-parallel-size 1"), wanted, ANOTHER_ORDER)


def test_other_precisions_go_on_from_delayed_scales(whole, resumed):
    """And padding is no routing: experts per token are bfloat16's, but for a token or two that FP8 moves."""
    wanted = resumed("bfloat16")
    assert_close(resumed("bfloat16", "--moe-expert-backend torch"), wanted, ANOTHER_ORDER)
    for recipe in ("delayed", "blockwise"):
        got = resumed(recipe)
        assert got["lm loss"] != wanted["lm loss"]
        # e4m3 rounds by up to 2^-4 where bfloat16 does by 2^-9, and four steps of training carry that on
        assert_close(got, wanted, 0.01, choices=0.02)


@pytest.mark.parametrize("case", RECOMPUTED)
def test_recomputed(resumed, case):
    recipe = case.partition(",")[0]
    got, wanted = resumed(recipe, RECOMPUTED[case]), resumed(recipe)
    if recipe != "delayed":
        assert got == wanted
        return
    # the loss is computed before anything is recomputed; gradients then see other scales, a cast of two bits apart
    assert got["lm loss"][SAVED + 1] == wanted["lm loss"][SAVED + 1]
    for name in SCALARS:
        for iteration, value in got[name].items():
            assert math.isclose(value, wanted[name][iteration], rel_tol=0.03), (name, iteration)


def test_weights_in_fp8(whole, resumed, tmp_path):
    """Gathered in FP8 they are what the forward pass casts anyway, and so again after a resume."""
    argv, save, _ = whole
    words = [*argv, *RECIPES["blockwise"].split(), "--fp8-param-gather", "--save", str(tmp_path / "save")]
    first = [
        *words,
        "--load",
        str(save),
        "--ckpt-step",
        str(SAVED),
        "--save-interval",
        "3",
        "--exit-interval",
        str(END),
    ]
    numbers = train([*first, "--exit-interval", str(END)], tmp_path / "first")
    assert numbers == resumed("blockwise")
    again = [*words, "--load", str(tmp_path / "save"), "--ckpt-step", "3", "--exit-interval", str(END)]
    assert train(again, tmp_path / "again") == after(numbers, 3)


def test_export_from_delayed_scales(whole, tmp_path, capsys):
    done = export_hf.main(["--checkpoint", str(whole[1]), "--output", str(tmp_path / "hf"), "--vocab-size", "120"])
    assert done == 0, capsys.readouterr()
    assert (tmp_path / "hf" / "model.safetensors").exists()


def test_mxfp8_is_for_blackwell(tmp_path):
    ranks.call(fp8_layers.check_mxfp8, ranks=2, folder=tmp_path)


def test_first_and_last_layers_stay_in_bfloat16(whole, tmp_path):
    argv, *_ = whole
    flags = """--num-layers 4 --pipeline-model-parallel-size 2 --expert-model-parallel-size 1 --first-last-layers-bf16
        --num-layers-at-start-in-bf16 1 --num-layers-at-end-in-bf16 1 --exit-interval 1"""
    words = [*argv, *RECIPES["blockwise"].split(), *flags.split()]
    words += ["--load", str(tmp_path / "none"), "--save", str(tmp_path / "save")]
    ranks.call(fp8_layers.check_layers_in_fp8, words, [2, 3], ranks=RANKS, folder=tmp_path)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_sentence(whole, tmp_path, case):
    argv, *_ = whole
    flags, says = REFUSED[case]
    words = [*argv, *flags.split(), "--load", str(tmp_path / "none"), "--save", str(tmp_path / "save")]
    run = ranks.start(ranks.pretrain, words, ranks=RANKS, folder=tmp_path / "ranks")
    assert all(run.wait())
    said = run.output(0) + run.output(1)
    assert says in said and "Traceback" not in said, said[-3000:]
    shutil.rmtree(tmp_path / "save", ignore_errors=True)


# As users run them: the scripts' own sizes, flags and recipe; one model of each routing.
@pytest.mark.parametrize("model", ["dynamic_moe_24l", "dynmoe_24l", "moe_plus_plus_7b"])
def test_smoke_of_the_script(model, tmp_path):
    settings = make_data(tmp_path) | {
        "SMOKE": "1",
        "FP8": "1",
        "TRANSFORMER_IMPL": "transformer_engine",
        "TRAIN_ITERS": "10",
    }
    argv = command(model, settings, tmp_path / "save", "--num-workers", "0", "--exit-interval", "2")
    assert argv[argv.index("--fp8-recipe") + 1] == "blockwise"
    numbers = train([*argv, "--eval-iters", "0", "--split", "100,0,0"], tmp_path)
    assert numbers["lm loss"][2] < numbers["lm loss"][1]


def test_experts_and_ranks_without_rows(tmp_path):
    ranks.call(fp8_layers.check_idle_experts, ranks=2, folder=tmp_path)
