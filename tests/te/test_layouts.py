"""One checkpoint, trained on in many ways by ``pretrain.sh``'s flags: what must not change a number does not.

The model is MoE++'s, which has gating residuals and zero-computation experts; with a shared expert on top.
"""

import math

import pytest

from tests.te.runs import SCALARS, command, make_data, train

START, END = 2, 4
SHARED = ("--moe-shared-expert-intermediate-size", "64")
# Another order of sums: a rounding to bfloat16 here and there.
BFLOAT16 = 2**-8

SAME = {
    "apex": "",
    "recompute moe": "--recompute-granularity selective --recompute-modules moe",
    "recompute moe_act and layernorm": "--recompute-granularity selective --recompute-modules moe_act layernorm",
    "recompute core_attn": "--recompute-granularity selective --recompute-modules core_attn",
    "recompute shared_experts": "--recompute-granularity selective --recompute-modules shared_experts",
    "recompute full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "no overlap": "without --overlap-grad-reduce --overlap-param-gather",
}
CLOSE = {
    "unfused accumulation": "--no-gradient-accumulation-fusion",
    "shared-expert overlap": "--moe-shared-expert-overlap",
    "pipeline": "--pipeline-model-parallel-size 2 --expert-model-parallel-size 1",
    # the vocabulary is padded to the same 128
    "tensor": "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 "
    "--make-vocab-size-divisible-by 64",
    "plain permute": "without --moe-permute-fusion",
    "row per expert": "--moe-dispatch-unit expert",
    "row per rank": "--moe-dispatch-unit rank",
    "torch experts": "--moe-expert-backend torch",
}
FP8 = {
    "delayed": "--fp8-format hybrid --fp8-recipe delayed",
    "tensorwise": "--fp8-format hybrid --fp8-recipe tensorwise",
    "blockwise": "--fp8-format e4m3 --fp8-recipe blockwise --fp8-param-gather",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The command line without ``--save`` and ``--load``, a checkpoint, and two iterations from there."""
    folder = tmp_path_factory.mktemp("base")
    argv = command("moe_plus_plus_1b", make_data(folder), folder / "save", *SHARED)
    train([*argv, "--exit-interval", str(START)], folder / "first")
    return argv, folder / "save", run(argv, folder / "save", folder / "base")


def run(argv, load, folder, flags="", **kwargs):
    words = flags.split()
    if words[:1] == ["without"]:
        argv, words = [word for word in argv if word not in words[1:]], []
    where = ["--load", str(load), "--save", str(folder / "save"), "--exit-interval", str(END)]
    return train([*argv, *words, *where], folder, **kwargs)


def assert_close(got, base, tolerance):
    for name in SCALARS:
        assert sorted(got[name]) == [START + 1, END], name
        for iteration, value in got[name].items():
            assert math.isclose(value, base[name][iteration], rel_tol=tolerance), (name, iteration)


@pytest.mark.parametrize("name", SAME)
def test_no_number_changes(base, name, tmp_path):
    argv, load, wanted = base
    assert run(argv, load, tmp_path, SAME[name], with_apex=name == "apex") == wanted


@pytest.mark.parametrize("name", CLOSE)
def test_only_roundings_change(base, name, tmp_path):
    argv, load, wanted = base
    assert_close(run(argv, load, tmp_path, CLOSE[name]), wanted, BFLOAT16)


@pytest.mark.parametrize("name", FP8)
def test_fp8_stays_beside_bfloat16(base, name, tmp_path):
    argv, load, wanted = base
    got = run(argv, load, tmp_path, FP8[name])
    assert got["lm loss"] != wanted["lm loss"]  # or nothing was cast
    # numbers of three or two bits, in sums of 48 to 64 of them: one part in a hundred, and the routing follows
    assert_close(got, wanted, 0.02)


def test_to_megatrons_own_layers_and_back(base, tmp_path):
    """Specs name the norm before experts in two ways; a checkpoint keeps the way that it was born with."""
    argv, load, wanted = base
    local = [word for word in argv if word not in ("--moe-grouped-gemm", "--moe-permute-fusion")]
    local += "--transformer-impl local --no-persist-layer-norm --no-rope-fusion --no-masked-softmax-fusion".split()
    assert_close(run(local, load, tmp_path / "there"), wanted, BFLOAT16)
    born = tmp_path / "born"
    train([*local, "--save", str(born / "save"), "--load", str(born / "save"), "--exit-interval", str(START)], born)
    stays = run(local, born / "save", tmp_path / "stays")
    without_fp8_states = [*argv, "--dist-ckpt-strictness", "log_all"]
    assert_close(run(without_fp8_states, born / "save", tmp_path / "back"), stays, BFLOAT16)
