"""Save tiny megatron models in several layouts, with their logits; run by torchrun on two ranks with a folder OUT.

For each case, OUT/CASE/iter_0000007 is a checkpoint as megatron.training saves it (the same keys and saved arguments)
and OUT/CASE.pt holds tokens [2, 128], megatron's logits [2, 128, V] for them, and a greedy continuation of a prompt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_dynmoe import DynMoEConfig, host

DYNMOE = {
    **{"gate": "cosine", "rule": "top-any", "cosine_scale": 4.0, "adaptive_experts": True, "initial_experts": 3},
    **{"residual": True},
}
VOCAB, PROMPT, NEW_TOKENS = 500, 16, 12
SHARED_FLAGS = """
    --num-layers 4 --hidden-size 32 --ffn-hidden-size 40 --num-attention-heads 4 --kv-channels 12 --seq-length 128
    --max-position-embeddings 128 --position-embedding-type rope --rotary-base 5000 --normalization RMSNorm --swiglu
    --norm-epsilon 1e-4 --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.2
    --num-experts 4 --moe-ffn-hidden-size 24 --moe-token-dispatcher-type alltoall --expert-tensor-parallel-size 1
    --tokenizer-type NullTokenizer --micro-batch-size 1 --lr 1e-3
""".split()
# One case per layout; together they cover both forms of keys, both rules, and the options of attention and embedding.
CASES = {
    "ep2": (
        "--expert-model-parallel-size 2 --group-query-attention --num-query-groups 2 --moe-router-topk 2 "
        "--untie-embeddings-and-output-weights --moe-shared-expert-intermediate-size 20 --moe-shared-expert-gate",
        DynMoEConfig(rule="top-p", top_p=0.6, max_experts_per_token=3),
    ),
    "tp2": (
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 --moe-layer-freq 2 "
        "--moe-router-topk 2",
        DynMoEConfig(rule="top-k", topk=2, normalize_weights=True),
    ),
    "pp2-stock": (
        "--pipeline-model-parallel-size 2 --moe-layer-freq [0,1,1,0] --moe-router-topk 2 "
        "--untie-embeddings-and-output-weights",
        None,
    ),
    "dynmoe-ep2": (
        "--expert-model-parallel-size 2 --moe-shared-expert-intermediate-size 20 --untie-embeddings-and-output-weights",
        DynMoEConfig(**DYNMOE),
    ),
    "dynmoe-pp2": (
        "--pipeline-model-parallel-size 2 --moe-layer-freq [0,1,1,0] --moe-shared-expert-intermediate-size 20",
        DynMoEConfig(**DYNMOE, train_cosine_scale=True, max_experts_per_token=2),
    ),
    "mpp-ep2": (
        "--expert-model-parallel-size 2 --moe-layer-freq [1,0,1,1] --moe-shared-expert-intermediate-size 20 "
        "--untie-embeddings-and-output-weights",
        DynMoEConfig.from_preset("moe-plus-plus", residual=True, logits_norm_std=2.0),
    ),
    "mpp-released-tp2": (
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2",
        DynMoEConfig.from_preset("moe-plus-plus-released"),
    ),
    "threshold-tp2": (
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 --moe-layer-freq 2",
        DynMoEConfig(
            gate="sigmoid",
            rule="threshold",
            threshold=0.55,
            learned_thresholds=True,
            threshold_keep_best=False,
            normalize_weights=True,
        ),  # fmt: skip
    ),
}


def main() -> None:
    host.enable()
    dist.init_process_group(host.backend())
    for name, (flags, dynmoe) in CASES.items():
        run_case(Path(sys.argv[1]), name, flags.split(), dynmoe)
    dist.destroy_process_group()


def run_case(out: Path, name: str, flags: list[str], dynmoe: DynMoEConfig | None) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    args = megatron_args(flags, dynmoe)
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    model_parallel_cuda_manual_seed(1234)
    model = build_model(args, dynmoe)
    set_experts(model)
    save(out / name, args, model)
    tokens = torch.randint(0, VOCAB, (2, 128), generator=torch.Generator().manual_seed(5))
    continued = tokens[:1, :PROMPT]
    for _ in range(NEW_TOKENS):
        # right padding: a length that sequence parallelism divides; it does not reach back through the causal mask
        padded = torch.nn.functional.pad(continued, (0, 32 - continued.shape[1]))
        best = logits(model, args, padded)[:, continued.shape[1] - 1, :VOCAB].argmax(dim=-1, keepdim=True)
        continued = torch.cat([continued, best], dim=1)
    result = {"tokens": tokens, "logits": logits(model, args, tokens)[..., :VOCAB], "continued": continued}
    if dist.get_rank() == 0:
        torch.save(result, out / f"{name}.pt")
    parallel_state.destroy_model_parallel()


def megatron_args(flags: list[str], dynmoe: DynMoEConfig | None):
    from megatron.training.arguments import parse_args, validate_args

    from megatron_dynmoe.config import dest_of
    from megatron_dynmoe.routers.router_config import all_fields

    sys.argv[1:] = [sys.argv[1], *host.default_flags(), *SHARED_FLAGS, "--vocab-size", str(VOCAB), *flags]
    out, sys.argv[1:] = sys.argv[1], sys.argv[2:]
    args = validate_args(parse_args(), {})
    sys.argv[1:] = [out]
    if dynmoe is not None:
        for field in all_fields(DynMoEConfig):
            setattr(args, dest_of(field.name), getattr(dynmoe, field.name))
    return args


def build_model(args, dynmoe: DynMoEConfig | None):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder

    from megatron_dynmoe.mcore.specs import dynamic_layer_spec

    def layer_spec(config, vp_stage=None):
        spec = get_gpt_decoder_block_spec(config.transformer, False, normalization="RMSNorm", vp_stage=vp_stage)
        return spec if dynmoe is None else dynamic_layer_spec(spec, dynmoe)

    config = gpt_config_from_args(args)
    config.transformer_layer_spec, config.parallel_output = layer_spec, False
    return GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups()).eval()


@torch.no_grad()
def set_experts(model) -> None:
    """Other slots active in each layer; thresholds that leave some tokens without an expert; a mixer that mixes."""
    for layer in model.decoder.layers:
        router = getattr(layer.mlp, "router", None)
        if not hasattr(router, "experts_mask"):
            continue
        router.experts_mask.copy_(torch.arange(4) != layer.layer_number % 4)
        router.thresholds.copy_(torch.tensor([-0.2, 0.0, 0.1, 0.2]))
        layer.mlp.mixer.bias.copy_(torch.tensor([0.5, -0.5]))
        if hasattr(router, "logit_scale"):
            router.logit_scale += 0.1 * layer.layer_number


def save(folder: Path, args, model) -> None:
    from megatron.core import dist_checkpointing

    iteration = folder / "iter_0000007"
    if dist.get_rank() == 0:
        iteration.mkdir(parents=True)
        (folder / "latest_checkpointed_iteration.txt").write_text("7")
    dist.barrier()
    args.rank = 0  # as checkpointing does: what is not a tensor must be the same on all ranks
    dist_checkpointing.save({"args": args, "iteration": 7, "model": model.sharded_state_dict()}, str(iteration))


@torch.no_grad()
def logits(model, args, tokens):
    """Logits [B, S, V] on every rank; pipeline stages pass the hidden state by hand."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    if args.pipeline_model_parallel_size == 1:
        return model(tokens, positions, None)
    if dist.get_rank() == 0:
        hidden = model(tokens, positions, None)
        dist.send(hidden, 1)
    else:
        hidden = torch.empty(tokens.shape[1], tokens.shape[0], args.hidden_size)
        dist.recv(hidden, 0)
        model.set_input_tensor(hidden)
    shape = (*tokens.shape, 512)
    found = model(tokens, positions, None) if dist.get_rank() == 1 else torch.empty(shape)
    found = found.contiguous()
    dist.broadcast(found, 1)
    return found


if __name__ == "__main__":
    main()
