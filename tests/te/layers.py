"""Bodies of test_layers.py, for a rank: the dynamic layer with Transformer Engine's experts beside torch's."""

from pathlib import Path

import torch

S, B, D, F, E = 24, 2, 64, 48, 8
TOLERANCE = {
    # sums of at most 64 products in two orders, three in a row
    torch.float32: 2**-24 * 64,
    # one rounding more or less of an activation, relative to the largest number: half of 2^-8
    torch.bfloat16: 2e-3,
}


def start() -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)


def build(backend: str, dtype: torch.dtype, *, p: float = 0.4, **extra):
    """A dynamic layer of Transformer Engine's spec with the experts of ``backend``."""
    return build_dynamic(dtype, {"top_p": p, "expert_backend": backend}, **extra)


def build_dynamic(dtype: torch.dtype, dynmoe: dict, **extra):
    """A dynamic layer of Transformer Engine's spec: fields of our configuration, and of megatron's."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dynmoe.config import DynMoEConfig
    from megatron_dynmoe.mcore.specs import dynamic_layer_spec

    settings = {
        "num_layers": 1,
        "hidden_size": D,
        "num_attention_heads": 2,
        "num_moe_experts": E,
        "ffn_hidden_size": F,
        "moe_ffn_hidden_size": F,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
        "moe_router_pre_softmax": True,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "bias_activation_fusion": False,
        "add_bias_linear": False,
        "gradient_accumulation_fusion": False,
        "normalization": "RMSNorm",
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
    }
    config = TransformerConfig(**(settings | extra))
    spec = get_gpt_layer_with_transformer_engine_spec(num_experts=E, moe_grouped_gemm=True)
    spec = dynamic_layer_spec(spec, DynMoEConfig(**dynmoe))
    layer = spec.submodules.mlp(config=config, layer_number=1)
    layer.set_layer_number(1)
    return layer


def pair(dtype: torch.dtype, **extra):
    """Torch's and Transformer Engine's layer with the same weights, large enough that routing is uneven."""
    ours, theirs = build("torch", dtype, **extra), build("te", dtype, **extra)
    assert type(theirs.experts).__name__ == "TEGroupedMLP"
    torch.manual_seed(2)
    with torch.no_grad():
        ours.router.weight.normal_(std=0.2)
        ours.experts.weight1.normal_(std=D**-0.5)
        ours.experts.weight2.normal_(std=F**-0.5)
    return ours, theirs


def hand_over(source, target, folder: Path) -> None:
    """By a distributed checkpoint."""
    save(source, folder)
    load(target, folder)


def save(layer, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    folder.mkdir(exist_ok=True)
    dist_checkpointing.save(layer.sharded_state_dict(prefix="mlp.", metadata=metadata()), str(folder))


def load(layer, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load(layer.sharded_state_dict(prefix="mlp.", metadata=metadata()), str(folder))
    layer.load_state_dict({key.removeprefix("mlp."): value for key, value in state.items()})


def metadata() -> dict:
    from megatron.core import parallel_state

    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def one_pass(layer, x, grad) -> dict[str, torch.Tensor]:
    """Output and gradients; experts' as [E, out, in] whatever holds them."""
    x = x.clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    out, _ = layer(x)
    out.backward(grad)
    experts = layer.experts
    if hasattr(experts, "weight1"):
        fc1, fc2 = experts.weight1.grad, experts.weight2.grad
    else:
        fc1, fc2 = (
            torch.stack([getattr(linear, f"weight{e}").grad for e in range(E)])
            for linear in (experts.linear_fc1, experts.linear_fc2)
        )
    router = layer.router.weight.grad
    return {"output": out.detach(), "input": x.grad, "router": router, "fc1": fc1, "fc2": fc2}


def compare(ours, theirs, x, grad, tolerance: float, what: object) -> None:
    wanted, got = one_pass(ours, x, grad), one_pass(theirs, x, grad)
    for name, value in wanted.items():
        other = got[name] if got[name].shape == value.shape else got[name].transpose(-1, -2)
        error = (other.double() - value.double()).abs().max() / value.abs().max()
        assert error <= tolerance, (what, name, error)


def inputs(dtype):
    torch.manual_seed(3)
    return torch.randn(S, B, D).to(dtype), torch.randn(S, B, D).to(dtype)


def check_equal_to_torch_experts(folder: Path) -> None:
    """Checkpoints go both ways, and both layers compute the same: sets of any size, fused and plain permutation."""
    start()
    for dtype, tolerance in TOLERANCE.items():
        x, grad = inputs(dtype)
        for p in (0.0, 0.4, 1.0):
            for fused in (False, True):
                case = f"{dtype} {p} {fused}"
                ours, theirs = pair(dtype, p=p, moe_permute_fusion=fused)
                hand_over(ours, theirs, folder / case)
                compare(ours, theirs, x, grad, tolerance, case)
        with torch.no_grad():
            ours.experts.weight1.zero_()
            ours.router.weight.zero_()
        hand_over(theirs, ours, folder / f"back {dtype}")
        compare(ours, theirs, x, grad, tolerance, f"back {dtype}")


def check_experts_without_rows() -> None:
    """No rows at all, and all rows to one expert: zeros where nothing came, and a gradient for every weight."""
    from benchmarks.gpu.layers import answers

    start()
    x, grad = inputs(torch.bfloat16)
    for used in ([], [E - 1]):
        for extra in ({}, {"moe_permute_fusion": True}):
            layer = build("te", torch.bfloat16, **extra)
            chosen = torch.zeros(S * B, E, dtype=torch.bool)
            chosen[:, used] = True
            weights = (chosen * 0.5).requires_grad_()
            answers(layer, weights, chosen)
            out, _ = layer(x.clone().requires_grad_())
            out.backward(grad)
            assert bool((out == 0).all()) == (not used)
            for name, weight in layer.experts.named_parameters():
                idle = not used or not name.endswith(f"weight{E - 1}")
                assert weight.grad is not None and bool((weight.grad == 0).all()) == idle, name
