"""The host runtime: what it redirects, for whom, that all of it is undone, and that stock megatron trains on it."""

import logging
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch
from megatron.core.datasets import utils as dataset_utils
from megatron.core.distributed import distributed_data_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.data import DataLoader, dataloader

from megatron_dynmoe import host
from megatron_dynmoe.mcore.norm import build_norm, replace_norms
from tests import host_smoke, ranks

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="the redirection is for machines without CUDA")

TOUCHED = {
    "torch": torch,
    "torch.cuda": torch.cuda,
    "torch.cuda.random": torch.cuda.random,
    "Tensor": torch.Tensor,
    "DataLoader iterator": dataloader._BaseDataLoaderIter,
    "megatron random": megatron_random,
    "megatron optimizer": DistributedOptimizer,
    "megatron plain optimizer": Float16OptimizerWithFloat16Params,
    "megatron buckets": distributed_data_parallel,
    "megatron datasets": dataset_utils,
}


@pytest.fixture
def on_host():
    """The redirection, for one test."""
    with host.enabled() as active:
        assert active
        yield


def ask(expression: str, module: str, **names):
    """The value of an expression written in a module of that name."""
    return eval(expression, {"__name__": module, "torch": torch, **names})


# ---- enable and disable ---------------------------------------------------------------------------------------------


@without_cuda
def test_disable_restores_the_identical_objects():
    before = {name: dict(vars(owner)) for name, owner in TOUCHED.items()}
    filters = list(logging.getLogger(megatron_random.__name__).filters)

    assert host.enable() and host.enable() and host.active()
    for name, owner in TOUCHED.items():
        assert dict(vars(owner)) != before[name], name
    host.disable()

    assert not host.active()
    for name, owner in TOUCHED.items():
        now = vars(owner)
        assert [k for k, v in before[name].items() if now[k] is not v] == [], name
        added = {k: v for k, v in now.items() if k not in before[name]}
        assert all(isinstance(v, ModuleType) for v in added.values()), (name, added)  # submodules imported meanwhile
    assert logging.getLogger(megatron_random.__name__).filters == filters
    host.disable()  # without effect


@without_cuda
def test_enabled_leaves_an_outer_enable_in_place():
    with host.enabled():
        with host.enabled():
            pass
        assert host.active()
    assert not host.active()


def test_with_transformer_engine_nothing_is_left_out(monkeypatch):
    monkeypatch.setattr(host, "_cuda_is_available", lambda: True)
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: name == "transformer_engine" or None)
    assert host.default_flags() == []


@pytest.mark.parametrize("apex", [False, True])
def test_transformer_engine_takes_the_place_of_apex_kernel_where_that_is_missing(apex, monkeypatch):
    from megatron.core.extensions import transformer_engine
    from megatron.core.tensor_parallel import layers

    name = "fused_weight_gradient_mlp_cuda"
    monkeypatch.setattr(transformer_engine, "te_general_gemm", lambda *args, **kwargs: None)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", apex)
    with host.enabled():
        assert layers._grad_accum_fusion_available
        assert (name in sys.modules) == hasattr(layers, name) == (not apex)
    assert name not in sys.modules and not hasattr(layers, name)
    assert layers._grad_accum_fusion_available == apex


def test_with_cuda_only_what_is_at_fault_everywhere_is_touched(monkeypatch):
    monkeypatch.setattr(host, "_cuda_is_available", lambda: True)
    before = {name: dict(vars(owner)) for name, owner in TOUCHED.items()}
    with host.enabled() as active:
        assert not active and not host.active()
        assert host.backend() == "nccl" and "gloo" not in host.default_flags()
        changed = [(n, k) for n, owner in TOUCHED.items() for k, v in before[n].items() if vars(owner)[k] is not v]
        assert set(changed) == {
            ("megatron datasets", "compile_helpers"),
            ("megatron optimizer", "_build_optimizer_group_ranges"),
            ("megatron optimizer", "_set_main_param_and_optimizer_states"),
            ("megatron plain optimizer", "sharded_state_dict"),
        }
    assert dataset_utils.compile_helpers is before["megatron datasets"]["compile_helpers"]


def test_make_is_not_run_when_the_helper_imports(monkeypatch):
    calls = []
    monkeypatch.setattr(
        subprocess, "run", lambda command: calls.append(command) or subprocess.CompletedProcess(command, 0)
    )
    with host.enabled():
        dataset_utils.compile_helpers()
        assert calls == []
        monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)  # its import now fails
        dataset_utils.compile_helpers()
    assert [command[0] for command in calls] == ["make"]


# ---- what it answers ------------------------------------------------------------------------------------------------


@without_cuda
@pytest.mark.parametrize(
    ("expression", "to_megatron", "to_others"),
    [
        ("torch.cuda.is_available()", True, False),
        ("torch.cuda.device_count()", 1, 0),
        ("torch.ones(1).is_cuda", True, False),
        ("torch.ones(1).type()", "torch.cuda.FloatTensor", "torch.FloatTensor"),
        ("torch.ones(1).bfloat16().type()", "torch.cuda.BFloat16Tensor", "torch.BFloat16Tensor"),
    ],
)
def test_the_claim_is_made_to_megatron_alone(on_host, expression, to_megatron, to_others):
    assert ask(expression, "megatron.core.optimizer") == to_megatron
    assert ask(expression, "megatron_dynmoe.mcore") == to_others
    assert ask(expression, "torch.optim") == to_others


class MakesTensorsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + torch.zeros(2, device="cuda") + grad.new_zeros(2, device=torch.cuda.current_device())


PLACEMENTS = {
    "factory, name": lambda: torch.zeros(2, device="cuda"),
    "factory, index": lambda: torch.tensor([1.0, 2.0], device=torch.cuda.current_device()),
    "factory, device": lambda: torch.empty(2, device=torch.device("cuda", 0), pin_memory=True),
    "like": lambda: torch.zeros_like(torch.ones(2), device="cuda:0"),
    "new": lambda: torch.ones(2).new_empty(2, device="cuda"),
    "to, name": lambda: torch.ones(2).to("cuda", torch.float64),
    "to, index": lambda: torch.ones(2).to(0, non_blocking=True),
    "to, keyword": lambda: torch.ones(2).to(device="cuda", dtype=torch.float64),
    "cuda": lambda: torch.ones(2).cuda(torch.cuda.current_device(), non_blocking=True),
    "pin": lambda: torch.ones(2).pin_memory(),
    "module": lambda: torch.nn.Linear(2, 2, device="cuda").cuda(0).to("cuda").weight,
}


@without_cuda
@pytest.mark.parametrize("place", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_cuda_as_a_place_is_the_cpu(on_host, place):
    assert place().device == torch.device("cpu")


@without_cuda
def test_placement_holds_in_backward_and_in_other_threads(on_host):
    x = torch.ones(2, requires_grad=True)
    torch.autograd.backward(MakesTensorsInBackward.apply(x).sum())
    assert x.grad.tolist() == [1, 1]

    devices = []
    thread = threading.Thread(target=lambda: devices.append(torch.ones(1, device="cuda").cuda().device))
    thread.start()
    thread.join()
    assert devices == [torch.device("cpu")]


@without_cuda
def test_other_arguments_keep_their_meaning(on_host):
    with torch.device("meta"):
        assert torch.zeros(2).is_meta and torch.nn.Linear(2, 2).weight.is_meta
    assert torch.ones(2).to(torch.float64).dtype == torch.float64
    assert torch.ones(2).to(torch.ones(1, dtype=torch.int32)).dtype == torch.int32
    assert torch.ones(2).type(torch.int64).dtype == torch.int64
    assert torch.zeros(2, 3, dtype=torch.int8).shape == (2, 3)
    assert torch.zeros(2, device="meta").is_meta


@without_cuda
def test_streams_are_in_step_and_memory_is_the_process(on_host):
    stream, event = torch.cuda.Stream(device="cuda"), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.current_stream())
        event.record(stream)
        stream.wait_event(stream.record_event())
        torch.ones(1).record_stream(stream)
    event.wait(stream)
    event.synchronize()
    torch.cuda.synchronize()
    assert event.query()
    now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    assert 50e6 < now <= peak + 1e6  # torch alone takes more than 50 MB; the two are read one after the other
    assert torch.cuda.memory_stats()["reserved_bytes.all.current"] > 50e6


@without_cuda
def test_compiled_functions_run_eagerly():
    compiled = []

    def backend(module, inputs):
        compiled.append(module)
        return module.forward

    with host.enabled():
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))
        assert compiled == []
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))
    assert len(compiled) == 1


@without_cuda
def test_rng_tracker_forks_and_restores_without_a_warning(on_host, caplog):
    tracker = megatron_random.CudaRNGStatesTracker()
    torch.cuda.manual_seed(1)
    tracker.add("a", 2)
    start = torch.cuda.get_rng_state()
    with tracker.fork("a"):
        first = torch.rand(3)
    assert torch.equal(torch.cuda.get_rng_state(), start)
    with tracker.fork("a"):
        second = torch.rand(3)
    draws = torch.rand(6, generator=torch.Generator().manual_seed(2))
    assert torch.equal(torch.cat([first, second]), draws)  # the tracked state went on from where it was
    assert "CPU RNG state changed" not in caplog.text


@without_cuda
def test_making_a_data_iterator_does_not_draw():
    def draws() -> bool:
        before = torch.get_rng_state()
        iter(DataLoader([1, 2, 3]))
        return not torch.equal(before, torch.get_rng_state())

    assert draws()
    with host.enabled():
        assert not draws()


# ---- the norms that the host's local layer spec needs for sequence parallelism --------------------------------------


def norm_config(**fields) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, tensor_model_parallel_size=2, **fields)


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_compute_in_float32_and_carry_the_mark(name, dtype):
    config = norm_config(normalization=name, sequence_parallel=True, params_dtype=dtype)
    norm = build_norm(config, hidden_size=8, eps=1e-3)
    assert all(p.sequence_parallel and p.dtype == dtype for p in norm.parameters())
    generator = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        parameter.data = torch.randn(8, generator=generator).to(dtype)
    x = (torch.randn(5, 8, generator=generator) * 3 + 1).to(dtype)

    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True) if name == "LayerNorm" else wide
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    expected = expected + norm.bias.double() if name == "LayerNorm" else expected
    # Float32 inside, so the one coarse rounding is that of the result to its dtype (2^-8 in bfloat16). The absolute
    # part is a few float32 roundings of values around 5, where weight and bias cancel.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x).double(), expected, rtol=tolerance, atol=2e-6)


def test_norms_refuse_what_they_do_not_do():
    with pytest.raises(ValueError, match="normalization is 'L2Norm'"):
        build_norm(norm_config(normalization="L2Norm"), hidden_size=8)
    with pytest.raises(ValueError, match="layernorm_zero_centered_gamma is True"):
        build_norm(norm_config(layernorm_zero_centered_gamma=True), hidden_size=8)


def test_replace_norms_leaves_the_given_spec_alone():
    spec = get_gpt_layer_local_spec(num_experts=2, normalization="RMSNorm", qk_layernorm=True)
    replaced = replace_norms(spec)
    attention, stock_attention = (s.submodules.self_attention.submodules for s in (replaced, spec))
    assert replaced.submodules.input_layernorm is build_norm and replaced.submodules.pre_mlp_layernorm is build_norm
    assert attention.q_layernorm is build_norm and attention.core_attention is stock_attention.core_attention
    assert spec.submodules.input_layernorm is WrappedTorchNorm and stock_attention.q_layernorm is WrappedTorchNorm


# ---- stock megatron on it -------------------------------------------------------------------------------------------


def losses(run: ranks.Run, rank: int = 0) -> list[float]:
    """The loss of each micro-batch, exactly: those of 4 iterations, then of the evaluations; 4 each without DP."""
    return [float.fromhex(value) for value in re.findall(r"^loss (\S+)$", run.output(rank), re.MULTILINE)]


@without_cuda
def test_stock_megatron_trains_saves_and_resumes_in_another_layout(tmp_path: Path):
    shared = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
    save = [*shared, "--save", str(tmp_path / "checkpoint"), "--save-interval", "2"]
    layout = [
        *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
        *("--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"),
        *("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
    ]
    load = [*shared, "--load", str(tmp_path / "checkpoint"), "--ckpt-step", "2", "--no-load-rng", "--no-save-rng"]
    trained = losses(ranks.call(host_smoke.main, [*layout, *save], ranks=2, folder=tmp_path / "train"))
    resumed = losses(ranks.call(host_smoke.main, [*layout, *load], ranks=2, folder=tmp_path / "resume"))
    # The weights alone: with EP 2 megatron keeps two optimizers, with EP 1 one, and does not load either as the other.
    serial = losses(ranks.call(host_smoke.main, [*load, "--no-load-optim"], ranks=1, folder=tmp_path / "serial"))

    assert min(trained[-4:]) < trained[0]
    assert resumed == trained[8:]
    # One iteration from the same weights. Tensor parallelism adds up in another order: a few float32 roundings (6e-8
    # relative each) between layers; 1e-5 leaves room for a hundred.
    assert serial[:4] == pytest.approx(resumed[:4], rel=1e-5)


@without_cuda
@pytest.mark.parametrize(
    ("count", "flags"),
    [
        (2, "--pipeline-model-parallel-size 2 --num-layers 4 --num-layers-per-virtual-pipeline-stage 1"),
        (2, "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --hidden-dropout 0.1"),
    ],
    ids=["interleaved pipeline", "bfloat16 data parallel, distributed optimizer with overlap"],
)
def test_stock_megatron_trains(tmp_path: Path, count: int, flags: str):
    values = losses(ranks.call(host_smoke.main, flags.split(), ranks=count, folder=tmp_path), rank=count - 1)
    assert len(values) >= 8 and min(values[-2:]) < values[0]
