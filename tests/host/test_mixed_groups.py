"""bfloat16 models with a float32 router: optimizer groups of two dtypes, which megatron-core 0.19.2 mixes up."""

import random
from types import SimpleNamespace

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer, Range
from torch.nn import Parameter

from megatron_dynmoe import host
from megatron_dynmoe.config import ConfigError, DynMoEConfig
from megatron_dynmoe.mcore.checks import check_config
from megatron_dynmoe.mcore.controllers import Driver
from megatron_dynmoe.mcore.slots import Slice, check_optimizer, write
from tests import ranks
from tests.layouts import LAYOUTS, read_metrics, read_scalars
from tests.mixed_groups_ranks import INITS, pretrain
from tests.training.test_adaptive_parallel import model_flags

ADAPTIVE = """
    --bf16 --moe-preset dynmoe --num-experts 8 --moe-initial-experts 4 --moe-record-from 0 --moe-update-at 1
    --moe-update-period 2 --moe-max-added-experts 2 --moe-aux-loss-coeff 1e-2 --moe-efficiency-coeff 1e-2
""".split()
EP1, EP2, INTERLEAVED = (LAYOUTS[name][1].split() for name in ("dp2", "ep2", "vpp2"))
SHARDED = ["--use-distributed-optimizer"]
OVERLAP = [*SHARDED, "--overlap-grad-reduce", "--overlap-param-gather"]
RESHARDABLE = ["--dist-ckpt-optim-fully-reshardable"]
LAST = 8

# Legs of two ranks: name, its last iteration, its flags. What one leg saves the next one loads.
RESHARDED = [
    ("ep2", 3, [*EP2, *SHARDED, *RESHARDABLE]),
    ("ep1-overlap", 5, [*EP1, *OVERLAP, *RESHARDABLE]),
    ("ep2-again", 6, [*EP2, *SHARDED, *RESHARDABLE]),
    ("interleaved", LAST, [*INTERLEAVED, *SHARDED, *RESHARDABLE]),
]
DEFAULT_FORMAT = [("default", 4, [*EP2, *SHARDED]), ("default-overlap", LAST, [*EP2, *OVERLAP])]
PLAIN = [("plain-ep2", 4, EP2), ("plain-ep1", LAST, EP1)]


def run(folder, end, *extra, save=None):
    """Train two ranks to iteration ``end``, all main copies looked at after every step; returns ``folder``."""
    folder.mkdir(parents=True)
    argv = [*(flag for flag in model_flags() if flag not in RESHARDABLE), *ADAPTIVE, *extra]
    argv += ["--tensorboard-dir", str(folder / "tb"), "--moe-metrics-file", str(folder / "metrics.jsonl")]
    argv += ["--exit-interval", str(end)]
    argv += [] if save is None else ["--save", str(save), "--load", str(save), "--save-interval", str(end)]
    ranks.call(pretrain, argv, folder, ranks=2, folder=folder)
    return folder


def relay(legs, root):
    return [run(root / name, end, *flags, save=root / "checkpoint") for name, end, flags in legs]


def whole(folder, when):
    """The optimizer's state of the whole model, put together from what the two ranks wrote down."""
    parts = {}
    for rank in range(2):
        for key, (begin, values) in torch.load(folder / f"{when}{rank}.pt").items():
            parts.setdefault(key, {})[begin] = values
    return {key: torch.cat([pieces[begin] for begin in sorted(pieces)]) for key, pieces in parts.items()}


def assert_handed_over(saved, loaded):
    """Main copies and both moments of every parameter: what a leg ended with the next one begins with, bit for bit."""
    before, after = whole(saved, "end"), whole(loaded, "start")
    assert before.keys() == after.keys() and len(before) % 3 == 0
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("single") / "run", LAST, *EP2, *SHARDED)


@pytest.fixture(scope="module")
def resharded(tmp_path_factory):
    return relay(RESHARDED, tmp_path_factory.mktemp("resharded"))


def assert_close(folder, uninterrupted):
    """From equal weights a loss differs by a rounding of bfloat16, 2^-8, as layouts add up in another order.

    Later a weight that rounds the other way sends a token near a threshold elsewhere: four times that.
    """
    expected, got = read_scalars(uninterrupted / "tb", "lm loss"), read_scalars(folder / "tb", "lm loss")
    for iteration, loss in got.items():
        assert loss == pytest.approx(expected[iteration], rel=2**-8 if iteration == min(got) else 2**-6), iteration


def test_every_way_of_adding_experts_was_used(uninterrupted):
    records = read_metrics(uninterrupted / "metrics.jsonl")
    added = {change["iteration"] for record in records for change in record["expert_changes"] if change["added"]}
    assert {INITS[iteration // 2 % len(INITS)] for iteration in added} == {"keep", "fresh", "copy"}


@pytest.mark.parametrize("leg", range(len(RESHARDED)), ids=[name for name, *_ in RESHARDED])
def test_resumes_in_another_layout(uninterrupted, resharded, leg):
    assert_close(resharded[leg], uninterrupted)
    if 0 < leg < 3:  # the interleaved stages number their layers anew
        assert_handed_over(resharded[leg - 1], resharded[leg])


def test_resumes_from_the_default_format(uninterrupted, tmp_path):
    saved, resumed = relay(DEFAULT_FORMAT, tmp_path)
    assert_handed_over(saved, resumed)
    for name in ("lm loss", "grad-norm", "load_balancing_loss", "threshold"):
        expected = read_scalars(uninterrupted / "tb", name)
        got = read_scalars(saved / "tb", name) | read_scalars(resumed / "tb", name)
        assert got == expected  # the same layout: equal bits


def test_the_plain_optimizer_saves_and_resumes(uninterrupted, tmp_path):
    saved, resumed = relay(PLAIN, tmp_path)
    assert_handed_over(saved, resumed)
    assert_close(saved, uninterrupted)
    assert_close(resumed, uninterrupted)


# ---- megatron's faults, and their mends ------------------------------------------------------------------------------


def group_ranges(dtypes_by_group, build):
    """Main parameters by group, as megatron builds them, and its number of each parameter; one buffer a dtype."""
    groups = [[Parameter(torch.randn(3 + n).to(d)) for n, d in enumerate(group)] for group in dtypes_by_group]
    everything = [p for group in groups for p in group]
    param_groups = [{"params": list(group)} for group in groups]
    ranges = []
    for dtype in dict.fromkeys(p.dtype for p in everything):
        owned = {p: {"param": Range(0, p.numel())} for p in everything if p.dtype == dtype}
        ranges.append({(dtype, torch.float32): [{"param_map": owned}]})
    number, opt_ranges = build(DistributedOptimizer, param_groups, ranges)
    config = SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False, fp8_recipe=None)
    where = DistributedOptimizer._build_model_param_gbuf_map(ranges)
    DistributedOptimizer._build_model_and_main_param_groups(ranges, where, opt_ranges, config)
    return number, [group["params"] for group in param_groups]


def taken_for_another(dtypes_by_group, build):
    number, mains = group_ranges(dtypes_by_group, build)
    return [p for p, (group, order) in number.items() if not torch.equal(mains[group][order].to(p.dtype), p)]


def test_parameters_of_two_dtypes_are_numbered_as_their_main_copies():
    with host.enabled():
        mended = DistributedOptimizer._build_optimizer_group_ranges.__func__
        draw = random.Random(0)
        for _ in range(20):
            groups = [draw.choices([torch.bfloat16, torch.float32], k=draw.randint(0, 6)) for _ in range(3)]
            assert taken_for_another(groups, mended) == []
        mixed = [[torch.bfloat16, torch.float32]]
        assert taken_for_another(mixed, mended.__wrapped__), "megatron has mended it: host/mixed_groups.py can go"


def test_groups_of_one_dtype_are_numbered_as_ever():
    with host.enabled():
        mended = DistributedOptimizer._build_optimizer_group_ranges.__func__
        for dtype in (torch.bfloat16, torch.float32):
            orders = []
            for build in (mended, mended.__wrapped__):
                number, mains = group_ranges([[dtype] * 5, [dtype] * 2], build)
                orders.append((list(number.values()), [[main.numel() for main in group] for group in mains]))
            assert orders[0] == orders[1]


def test_a_float32_parameter_can_be_loaded_into():
    parameter = Parameter(torch.zeros(4))
    main = parameter.view(-1)[:]  # as the distributed optimizer holds its share
    inner = SimpleNamespace(param_groups=[{"params": [main]}], state={main: {}})
    config = SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False)
    leaf = SimpleNamespace(model_param_group_index_map={parameter: (0, 0)}, config=config, optimizer=inner)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        DistributedOptimizer._set_main_param_and_optimizer_states(leaf, parameter, {"param": torch.ones(4)})
    with host.enabled():
        DistributedOptimizer._set_main_param_and_optimizer_states(leaf, parameter, {"param": torch.ones(4)})
    assert parameter.tolist() == [1, 1, 1, 1]


# ---- what is refused -------------------------------------------------------------------------------------------------


def sharded_optimizer(mains, *, numbers=(0, 1)):
    """A distributed optimizer over a bfloat16 [3, 4] and a float32 [2, 2], of which this rank has all."""
    models = [Parameter(torch.randn(3, 4).bfloat16()), Parameter(torch.randn(2, 2))]
    leaf = object.__new__(DistributedOptimizer)
    leaf.is_stub_optimizer, leaf.config, leaf.ddp_config = False, SimpleNamespace(), SimpleNamespace()
    named = {"qkv.weight": models[0], "router.weight": models[1]}
    leaf.model_chunks = [SimpleNamespace(named_parameters=named.items)]
    leaf.model_float16_groups, leaf.model_fp32_groups = [[models[0]]], [[models[1]]]
    leaf.shard_fp32_from_float16_groups, leaf.shard_fp32_groups = [[mains[0]]], [[mains[1]]]
    leaf.model_param_gbuf_map = dict.fromkeys(models, (0, "dtype", 0))
    leaf.gbuf_ranges = [{"dtype": [{"param_map": {p: {"param": Range(0, p.numel())} for p in models}}]}]
    leaf.model_param_group_index_map = {p: (0, n) for p, n in zip(models, numbers, strict=True)}
    leaf.optimizer = SimpleNamespace(param_groups=[{"params": mains}], state={})
    return leaf, models


def test_a_copy_of_another_length_is_not_written_to():
    for mains, state, named in (
        ([torch.zeros(12), torch.zeros(12)], {}, ["copy of router.weight", "12 numbers", "but 4 "]),
        ([torch.zeros(12), torch.zeros(4)], {"exp_avg": torch.zeros(5)}, ["exp_avg of router.weight", "5 numbers"]),
    ):
        leaf, models = sharded_optimizer(mains)
        leaf.optimizer.state[mains[1]] = state
        before = models[1].detach().clone()
        with pytest.raises(RuntimeError) as refusal:
            write(leaf, Slice(models[1], 0), torch.ones(2), reset=True)
        assert all(part in str(refusal.value) for part in named), str(refusal.value)
        assert torch.equal(models[1], before) and not mains[1].any()


def test_an_optimizer_that_would_save_one_for_another_is_refused():
    mains = [torch.zeros(12), torch.zeros(4)]
    leaf, models = sharded_optimizer(mains)
    check_optimizer(leaf)
    write(leaf, Slice(models[1], 0), torch.ones(2), reset=True)
    assert mains[1].tolist() == [1, 1, 0, 0] and not mains[0].any()
    leaf, _ = sharded_optimizer(mains, numbers=(1, 0))
    with pytest.raises(ConfigError, match=r"host\.enable"):
        check_optimizer(leaf)
    leaf.ddp_config.use_megatron_fsdp = True
    with pytest.raises(ConfigError, match="--use-megatron-fsdp keeps out of reach"):
        check_optimizer(leaf)


def test_an_optimizer_out_of_reach_is_refused_in_the_first_forward_step():
    class Optimizer:
        is_stub_optimizer, config = False, SimpleNamespace(optimizer_cpu_offload=True)

        def scale_loss(self, loss):
            return loss

    chunk = torch.nn.Module()
    chunk.config = SimpleNamespace(grad_scale_func=Optimizer().scale_loss)
    driver = Driver(DynMoEConfig(gate="cosine", rule="top-any", adaptive_experts=True))
    with pytest.raises(ConfigError, match="--optimizer-cpu-offload keeps out of reach"):
        driver.before_pass(chunk)


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_quantised_weights_and_new_weights_for_added_experts_are_refused(kind):
    from tests.mcore.layers import layer_config

    config = layer_config()
    setattr(config, f"{kind}_param", True)
    adaptive = {"gate": "cosine", "rule": "top-any", "adaptive_experts": True}
    check_config(config, DynMoEConfig(**adaptive, added_expert_init="keep"))
    check_config(config, DynMoEConfig(**{**adaptive, "adaptive_experts": False}))
    for init in ("fresh", "copy"):
        with pytest.raises(ConfigError, match=f"^--{kind}-param-gather is True.*--moe-added-expert-init {init}"):
            check_config(config, DynMoEConfig(**adaptive, added_expert_init=init))
