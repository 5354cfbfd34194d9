"""Distributed checkpoints with random weights, in megatron-core's format and naming, written without megatron."""

import json
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter

# What megatron.training saves of its arguments, as far as a GPT with experts depends on them.
ARGS = {
    "num_layers": 2,
    "hidden_size": 8,
    "ffn_hidden_size": 12,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 4,
    "max_position_embeddings": 32,
    "seq_length": 32,
    "layernorm_epsilon": 1e-5,
    "rotary_base": 10000,
    "untie_embeddings_and_output_weights": True,
    "init_method_std": 0.02,
    "vocab_size": None,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "num_experts": 3,
    "moe_layer_freq": 1,
    "moe_ffn_hidden_size": 6,
    "moe_shared_expert_intermediate_size": None,
    "moe_router_topk": 2,
    "moe_rule": "top-p",
    "moe_gate": "softmax",
    "moe_top_p": 0.5,
    "moe_max_experts_per_token": None,
    "moe_normalize_weights": False,
}
ROWS = 20


def megatron_weights(args: Namespace, *, fused_norms: bool = False, rows: int = ROWS) -> dict[str, torch.Tensor]:
    """Random weights under megatron's keys: stacked over layers if all are alike, else one key per layer."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    width, heads, groups, head = args.hidden_size, args.num_attention_heads, args.num_query_groups, args.kv_channels
    freq, experts, ffn = args.moe_layer_freq, args.num_experts, args.moe_ffn_hidden_size
    sparse = freq if isinstance(freq, list) else [int(i % freq == 0) for i in range(args.num_layers)]
    layers = []
    for is_sparse in sparse:
        norm = "mlp.linear_fc1.layer_norm_weight" if fused_norms and not is_sparse else "pre_mlp_layernorm.weight"
        input_norm = "self_attention.linear_qkv.layer_norm_weight" if fused_norms else "input_layernorm.weight"
        layer = {
            input_norm: rand(width),
            "self_attention.linear_qkv.weight": rand((heads + 2 * groups) * head, width),
            "self_attention.linear_proj.weight": rand(width, heads * head),
            norm: rand(width),
        }
        if is_sparse:
            layer["mlp.router.weight"] = rand(experts, width)
            layer["mlp.experts.experts.linear_fc1.weight"] = rand(experts, 2 * ffn, width)
            layer["mlp.experts.experts.linear_fc2.weight"] = rand(experts, width, ffn)
        else:
            layer["mlp.linear_fc1.weight"] = rand(2 * args.ffn_hidden_size, width)
            layer["mlp.linear_fc2.weight"] = rand(width, args.ffn_hidden_size)
        layers.append(layer)
    weights = {"embedding.word_embeddings.weight": rand(rows, width), "decoder.final_layernorm.weight": rand(width)}
    if args.untie_embeddings_and_output_weights:
        weights["output_layer.weight"] = rand(rows, width)
    if freq == 1:
        return weights | {f"decoder.layers.{key}": torch.stack([layer[key] for layer in layers]) for key in layers[0]}
    return weights | {
        f"decoder.layers.{i}.{key}": tensor for i, layer in enumerate(layers) for key, tensor in layer.items()
    }


def write_checkpoint(folder: Path, args: Namespace, weights: dict[str, torch.Tensor]) -> Path:
    """`weights` and `args` as `folder`/iter_0000003, with an optimizer tensor that no export needs."""
    iteration = folder / "iter_0000003"
    iteration.mkdir(parents=True)
    state = {
        **weights,
        "optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(args.hidden_size),
        "common_state/shard_0_1": [{"args": args, "iteration": 3}],
    }
    writer = FileSystemWriter(iteration)
    dcp.save(state, storage_writer=writer, planner=DefaultSavePlanner(flatten_state_dict=False), no_dist=True)
    (iteration / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    return folder


def make(folder: Path, *, fused_norms: bool = False, dtype: torch.dtype = torch.float32, **changes):
    """A checkpoint of the given arguments; returns (folder, weights)."""
    args = Namespace(**(ARGS | changes))
    weights = {key: w.to(dtype) for key, w in megatron_weights(args, fused_norms=fused_norms).items()}
    return write_checkpoint(folder, args, weights), weights
