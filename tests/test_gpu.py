"""What only a GPU can show: the layer on CUDA kernels, Transformer Engine's experts, host synchronisations, NCCL.

The tests run in this process and not in forked ranks (tests/ranks.py): a fork cannot use CUDA once its parent has asked
for it. One rank, so nothing is sent; what is sent where is tested on CPU ranks.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parent.parent
S, B, D, F, E = 96, 2, 128, 192, 8
SEED = 5


@pytest.fixture(scope="module")
def megatron():
    """Megatron on one NCCL rank; taken down afterwards."""
    start_megatron()
    yield
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def start_megatron():
    from megatron_dynmoe import host

    host.enable()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group(host.backend(), store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(SEED)


def build(dynmoe, *, te=False, dtype=torch.float32, **extra):
    """A dynamic layer of megatron's local or Transformer Engine spec."""
    from megatron.core.models.gpt import gpt_layer_specs as specs
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dynmoe.mcore.specs import dynamic_layer_spec

    settings = {
        "num_layers": 1,
        "hidden_size": D,
        "num_attention_heads": 2,
        "num_moe_experts": E,
        "ffn_hidden_size": F,
        "moe_ffn_hidden_size": F,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": te,
        "moe_router_pre_softmax": True,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "bias_activation_fusion": False,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
    }
    config = TransformerConfig(**(settings | extra))
    if te:
        spec = specs.get_gpt_layer_with_transformer_engine_spec(num_experts=E, moe_grouped_gemm=True)
    else:
        spec = specs.get_gpt_layer_local_spec(num_experts=E, normalization="RMSNorm")
    layer = dynamic_layer_spec(spec, dynmoe).submodules.mlp(config=config, layer_number=1)
    layer.set_layer_number(1)
    return layer


def torch_layer(dtype, p, **extra):
    """A layer with torch experts, weights large enough that routing is uneven and every product matters."""
    from megatron_dynmoe.config import DynMoEConfig

    layer = build(DynMoEConfig(top_p=p, expert_backend="torch"), dtype=dtype, **extra)
    torch.manual_seed(SEED)
    with torch.no_grad():
        layer.router.weight.normal_(std=0.15)
        layer.experts.weight1.normal_(std=D**-0.5)
        layer.experts.weight2.normal_(std=F**-0.5)
    return layer


def inputs(dtype):
    torch.manual_seed(SEED + 1)
    return torch.randn(S, B, D, device="cuda").to(dtype), torch.randn(S, B, D, device="cuda").to(dtype)


def reference_pass(layer, x, grad, p, dtype):
    """Output, and gradients of input, router and experts, of reference.py in plain torch in ``dtype``.

    The router is float32 or wider, as everywhere; which experts are chosen is computed in float32 for all dtypes.
    """
    from megatron_dynmoe import reference

    leaves = [t.detach().to(dtype).requires_grad_() for t in (x.reshape(-1, D), layer.router.weight)]
    leaves += [t.detach().to(dtype).requires_grad_() for t in (layer.experts.weight1, layer.experts.weight2)]
    x_TD, router, fc1, fc2 = leaves
    chosen = reference.softmax_scores(x.reshape(-1, D).float(), layer.router.weight.float()).tolist()
    sets = [reference.top_p_set(row, p) if p < 1 else set(range(E)) for row in chosen]
    mask = torch.tensor([[e in s for e in range(E)] for s in sets], device=x.device)
    wide = torch.promote_types(dtype, torch.float32)
    scores = torch.softmax(x_TD.to(wide) @ router.to(wide).t(), dim=-1)
    out = reference.dense_moe(x_TD, torch.where(mask, scores, 0).to(dtype), fc1, fc2)
    out.backward(grad.reshape(-1, D).to(dtype))
    return [out.detach().view_as(x), leaves[0].grad.view_as(x), *(leaf.grad for leaf in leaves[1:])], mask


def layer_pass(layer, x, grad):
    """Output and the same gradients of the layer with torch experts."""
    x = x.detach().requires_grad_()
    layer.zero_grad(set_to_none=True)
    out, _ = layer(x)
    out.backward(grad)
    return [out.detach(), x.grad, layer.router.weight.grad, layer.experts.weight1.grad, layer.experts.weight2.grad]


def error(got, exact):
    return (got.double() - exact).abs().max().item()


NAMES = ("output", "input gradient", "router gradient", "fc1 gradient", "fc2 gradient")


@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_layer_equals_the_reference(megatron, dtype, p):
    layer = torch_layer(dtype, p)
    x, grad = inputs(dtype)
    exact, mask = reference_pass(layer, x, grad, p, torch.float64)
    plain, _ = reference_pass(layer, x, grad, p, dtype)
    assert torch.equal(layer.router(x)[1], mask)
    counts = mask.sum(dim=1)
    assert p != 0.4 or counts.min() < counts.max()  # ragged, or this tests little
    for name, ours, simple, truth in zip(NAMES, layer_pass(layer, x, grad), plain, exact, strict=True):
        # Twice what plain torch makes of the same weights in this dtype; and one rounding of the largest value, for
        # where plain torch happens to be exact.
        allowed = 2 * error(simple, truth) + torch.finfo(dtype).eps * truth.abs().max().item()
        assert error(ours, truth) <= allowed, (name, error(ours, truth), allowed)


def no_rows(x):
    """Weights and a map in which no token visits any expert (what a router of a later kind may decide)."""
    weights = torch.zeros(x.shape[0] * x.shape[1], E, device=x.device, requires_grad=True)
    return weights, torch.zeros(x.shape[0] * x.shape[1], E, dtype=torch.bool, device=x.device)


def one_expert(x):
    """All tokens to the last expert, the others have no row."""
    weights, chosen = no_rows(x)
    chosen[:, -1] = True
    return weights.detach().add_(0.5).requires_grad_(), chosen


@pytest.mark.parametrize("routed", [no_rows, one_expert])
@pytest.mark.parametrize("fused", [False, True], ids=["plain permute", "fused permute"])
def test_experts_without_rows(megatron, routed, fused, monkeypatch):
    if fused:
        pytest.importorskip("transformer_engine", reason="the fused permutation is Transformer Engine's")
    layer = torch_layer(torch.bfloat16, 0.4, moe_permute_fusion=fused)
    x, grad = inputs(torch.bfloat16)
    weights, chosen = routed(x)
    monkeypatch.setattr(layer.router, "forward", lambda *args, **kwargs: (weights, chosen))
    # What a kernel forgets to write is then seen: the allocator hands this memory out again.
    for weight in (layer.experts.weight1, layer.experts.weight2):
        torch.full_like(weight, float("nan"))
    out, x_grad, _, fc1_grad, fc2_grad = layer_pass(layer, x, grad)
    assert out.shape == x.shape and x_grad.shape == x.shape
    assert (out == 0).all() == (routed is no_rows)
    # An expert without rows has a zero gradient, not none: the reduction across ranks waits for it.
    assert (fc1_grad[:-1] == 0).all() and (fc2_grad[:-1] == 0).all()
    assert (fc1_grad[-1] == 0).all() == (routed is no_rows)


@pytest.mark.parametrize("routed", [no_rows, one_expert])
def test_transformer_engine_experts_without_rows(megatron, routed, monkeypatch):
    pytest.importorskip("transformer_engine")
    from megatron_dynmoe.config import DynMoEConfig

    layer = build(DynMoEConfig(expert_backend="te"), te=True, dtype=torch.bfloat16, moe_permute_fusion=True)
    x, grad = inputs(torch.bfloat16)
    weights, chosen = routed(x)
    monkeypatch.setattr(layer.router, "forward", lambda *args, **kwargs: (weights, chosen))
    out, _ = layer(x.requires_grad_())
    out.backward(grad)
    assert (out == 0).all() == (routed is no_rows)
    for name, weight in layer.experts.named_parameters():
        idle = routed is no_rows or not name.endswith(f"weight{E - 1}")
        assert weight.grad is not None and (weight.grad == 0).all() == idle, name


def test_fused_permute_equals_plain(megatron):
    pytest.importorskip("transformer_engine", reason="the fused permutation is Transformer Engine's")
    x, grad = inputs(torch.bfloat16)
    plain, fused = (layer_pass(torch_layer(torch.bfloat16, 0.4, moe_permute_fusion=f), x, grad) for f in (False, True))
    exact, _ = reference_pass(torch_layer(torch.bfloat16, 0.4), x, grad, 0.4, torch.float64)
    for name, a, b, truth in zip(NAMES, plain, fused, exact, strict=True):
        # As above: both move the same rows; only the sums over a token's rows may be rounded differently.
        allowed = 2 * error(a, truth) + torch.finfo(torch.bfloat16).eps * truth.abs().max().item()
        assert error(b, truth) <= allowed, name


@pytest.mark.parametrize("saver", ["torch", "te"])
def test_checkpoint_moves_between_torch_and_transformer_engine(megatron, tmp_path, saver):
    pytest.importorskip("transformer_engine")
    from megatron.core import dist_checkpointing, parallel_state

    from megatron_dynmoe.config import DynMoEConfig

    ours = torch_layer(torch.bfloat16, 0.4)
    te = build(DynMoEConfig(top_p=0.4, expert_backend="te"), te=True, dtype=torch.bfloat16)
    assert type(te.experts).__name__ == "TEGroupedMLP"
    first, second = (ours, te) if saver == "torch" else (te, ours)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    dist_checkpointing.save(first.sharded_state_dict(prefix="mlp.", metadata=metadata), str(tmp_path))
    state = dist_checkpointing.load(second.sharded_state_dict(prefix="mlp.", metadata=metadata), str(tmp_path))
    second.load_state_dict({key.removeprefix("mlp."): value for key, value in state.items()})

    x, grad = inputs(torch.bfloat16)
    exact, _ = reference_pass(ours, x, grad, 0.4, torch.float64)  # both hold the same weights now
    plain, _ = reference_pass(ours, x, grad, 0.4, torch.bfloat16)
    allowed = 2 * error(plain[0], exact[0]) + torch.finfo(torch.bfloat16).eps * exact[0].abs().max().item()
    for layer in (ours, te):
        assert error(layer(x)[0].detach(), exact[0]) <= allowed, type(layer.experts).__name__


def synchronisations(work):
    """How often ``work()`` makes the host wait for the device, as torch's own sync debug mode sees it."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [str(warning.message) for warning in caught if "synchronizing CUDA operation" in str(warning.message)]


# torch's grouped GEMM has its kernel for bfloat16 from Hopper on; elsewhere it falls back to a loop that reads the
# groups' ends on the host.
needs_grouped_kernel = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="torch's grouped GEMM loops on the host before Hopper",
)


@needs_grouped_kernel
def test_one_host_synchronisation_a_forward_pass(megatron):
    layer = torch_layer(torch.bfloat16, 0.4)
    x, grad = inputs(torch.bfloat16)
    layer_pass(layer, x, grad)  # kernels are loaded and memory is taken once
    outputs = []
    forward = synchronisations(lambda: outputs.append(layer(x.detach().requires_grad_())[0]))
    assert len(forward) == 1, forward  # the copy of the plan's counts
    backward = synchronisations(lambda: outputs[0].backward(grad))
    assert backward == []


def test_plan_synchronises_once_and_moves_not_at_all(megatron):
    from megatron_dynmoe import dispatch
    from megatron_dynmoe.routing import RoutePlan

    torch.manual_seed(SEED)
    chosen = torch.rand(512, E, device="cuda") < 0.3
    weights = torch.rand(512, E, device="cuda", requires_grad=True)
    x = torch.randn(512, D, device="cuda", requires_grad=True)

    def move(plan):
        rows, row_weights = dispatch.dispatch(x, weights, plan)
        dispatch.combine(rows * row_weights.unsqueeze(-1), plan, 512).sum().backward()

    move(RoutePlan.build(chosen))
    plans = []
    assert len(synchronisations(lambda: plans.append(RoutePlan.build(chosen)))) == 1
    assert synchronisations(lambda: move(plans[0])) == []
    assert plans[0].rows_sent == chosen.sum().item()


@pytest.mark.parametrize("preset", ["dynamic-moe", "dynmoe", "moe-plus-plus"])
def test_bfloat16_training_through_the_entry(tmp_path, preset):
    """Each router of the demo; DynMoE's updates at iteration 5, so that weights and optimizer state are written to."""
    from megatron_dynmoe.demo.steps import MODEL, ROUTING, TRAINING, flags

    routing = ROUTING[preset]
    if preset == "dynmoe":
        routing = routing | {"moe-record-from": 1, "moe-update-at": 5, "moe-added-expert-init": "copy"}
    metrics = tmp_path / "metrics.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    command += [str(ROOT / "examples" / "pretrain_dynmoe.py"), *flags(MODEL | routing), *flags(TRAINING)]
    command += ["--bf16", "--mock-data", "--split", "100,0,0", "--tokenizer-type", "NullTokenizer"]
    command += ["--vocab-size", "4095", "--train-iters", "10", "--lr-warmup-iters", "2", "--log-interval", "1"]
    command += ["--eval-iters", "0", "--use-distributed-optimizer", "--moe-token-dispatcher-type", "alltoall"]
    command += ["--save", str(tmp_path / "save"), "--moe-metrics-file", str(metrics)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "nccl" in next(line for line in done.stdout.splitlines() if "distributed_backend" in line)
    rows = [row for row in map(json.loads, metrics.read_text().splitlines()) if "lm_loss" in row]
    assert len(rows) >= 9 and rows[-1]["iteration"] == 10
    assert rows[-1]["lm_loss"] < rows[0]["lm_loss"]
    assert 0.1 < rows[-1]["experts_per_token"] < routing["num-experts"]
    assert ("zero_tokens" in rows[-1]) == (preset == "moe-plus-plus")
    assert ("active_experts" in rows[-1]) == (preset == "dynmoe")
    assert (tmp_path / "save" / "latest_checkpointed_iteration.txt").read_text() == "10"
