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


def pretrain_without_shapes(argv):
    """The entry; stages that tell each other shapes, which waits for the device each time, end the run."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    def exchange(*_):
        raise AssertionError("a stage asked for the shape of what it receives")

    P2PCommunicator._communicate_shapes = exchange
    return ranks.pretrain(argv)


def run(layout, *extra, folder):
    argv = [*flags(layout), "--tensorboard-dir", str(folder / "tb"), *extra]
    number = (LAYOUTS | DISTRIBUTED_OPTIMIZER)[layout][0]
    ranks.call(pretrain_without_shapes, argv, ranks=number, folder=folder)
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


# A residual and zero-computation experts do not see what chooses the unit on the wire, nor who multiplies.
OTHERS = [name for name in LAYOUTS if name not in ("ep2-auto", "sequential", "etp2-rank")]


@pytest.mark.parametrize("layout", [*OTHERS, *DISTRIBUTED_OPTIMIZER])
def test_layout_equals_serial(start, serial, layout, tmp_path):
    load = ("--load", str(start[layout in DISTRIBUTED_OPTIMIZER]), "--exit-interval", str(STEPS + 1))
    got = run(layout, *load, folder=tmp_path)
    for name in SCALARS:
        assert sorted(got[name]) == list(range(2, STEPS + 2))
        for iteration, value in got[name].items():
            # As in test_parallel.py, where the bound is derived: 10 * 16 roundings.
            assert math.isclose(value, serial[name][iteration], rel_tol=2**-24 * 160), (name, iteration)


EVALUATION = ("--eval-iters", "1", "--eval-interval", "1", "--split", "50,50,0", "--exit-interval", "2")


def test_stages_before_the_first_mixture_exchange_shapes(tmp_path):
    """The tensor is narrower there than behind it; with a first stage that has a mixture nothing is exchanged."""
    argv = [*flags("vpp2"), *EVALUATION]
    ranks.call(pretrain_without_shapes, argv, ranks=2, folder=tmp_path / "mixture first")
    argv[argv.index("--moe-layer-freq") + 1] = "[0,0,1,1]"
    ranks.call(ranks.pretrain, argv, ranks=2, folder=tmp_path / "dense first")
    refused = ranks.start(pretrain_without_shapes, argv, ranks=2, folder=tmp_path / "and asks")
    assert all(refused.wait()) and "a stage asked for the shape" in refused.output(0) + refused.output(1)


@pytest.mark.parametrize(
    ("changes", "wide"),
    [
        ({}, True),
        ({"virtual_pipeline_model_parallel_size": 2}, True),
        ({"moe_layer_freq": [0, 1, 1, 1]}, True),
        ({"moe_layer_freq": [0, 0, 1, 1]}, False),
        ({"moe_layer_freq": [0, 0, 1, 1], "num_layers_in_first_pipeline_stage": 3}, True),
        ({"moe_layer_freq": [0, 1, 1, 1], "virtual_pipeline_model_parallel_size": 2}, False),
        ({"pipeline_model_parallel_layout": "Et|tt|t|L"}, False),
        ({"pipeline_model_parallel_layout": "E|tt|t|tL"}, False),
        ({"pipeline_model_parallel_layout": "Et|t|t|tL"}, True),
    ],
    ids=str,
)
def test_width_between_stages(changes, wide):
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dynmoe.config import DynMoEConfig
    from megatron_dynmoe.mcore.stages import seen_by_schedule, width_between_stages

    dynmoe = DynMoEConfig(gating_residual=True, copy_experts=1, rule="top-k")
    for dtype, channels in ((torch.float32, 5), (torch.bfloat16, 10)):
        model = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_moe_experts": 4}
        stages = {"pipeline_model_parallel_size": 2, "pipeline_dtype": dtype, "params_dtype": dtype}
        config = TransformerConfig(**model, **stages, **changes)
        assert width_between_stages(config, dynmoe) == (32 + channels if wide else None)
    config.variable_seq_lengths = True
    seen = seen_by_schedule(config, 42)
    assert (seen.hidden_size, seen.variable_seq_lengths) == (42, False) and isinstance(seen, TransformerConfig)
    seen.grad_scale_func = len  # as training does
    assert config.grad_scale_func is len and (config.hidden_size, config.variable_seq_lengths) == (32, True)


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
