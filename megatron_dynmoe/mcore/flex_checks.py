"""What DeepEP and HybridEP ask of a configuration, of the ranks and of each step, said in sentences before they fail.

Where the numbers are from, in deepseek-ai/DeepEP:
    DeepEP      csrc/kernels/{intranode,internode}.cu: num_topk <= 32; a token visits at most 8 RDMA ranks (nodes of 8);
                bfloat16; buffers/legacy.py: numbers of ranks with a tuned configuration
    HybridEP    branch hybrid-ep, csrc/hybrid_ep/config.cuh: hidden_dim % 16, experts a rank * ranks a node % 4, and
                with several nodes 3 * tokens + 1 < 65536 (the depth of an InfiniBand queue); bfloat16
"""

from __future__ import annotations

import importlib
import math
import os
from dataclasses import fields

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dynmoe.checks import refuse
from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.routers import RULES

NEITHER = "choose another, or set --moe-token-dispatcher-type alltoall"
DTYPES = (torch.bfloat16,)  # the tests' stand-in also moves float32
MOST_CHOICES = 32  # places for experts a token, those of all tensor-parallel ranks together
NODE_RANKS, MOST_NODES = 8, 8
# 3 * T + 1 < 65536, T filled up to chunks of 64
MOST_TOKENS_ACROSS_NODES = (65536 - 2) // 3 // 64 * 64
DOMAIN = "NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN"  # how the library is told what it would else find out

NAMES = {"deepep": "DeepEP", "hybridep": "HybridEP"}
WHERE = {
    "deepep": "install DeepEP 1.2.1 of github.com/deepseek-ai/DeepEP, or its branch hybrid-ep",
    "hybridep": "install the branch hybrid-ep of github.com/deepseek-ai/DeepEP (HYBRID_EP_MULTINODE=1 for more nodes)",
}


# Fields that one library alone reads, and the values that ask for nothing.
READ_BY = {
    "moe_flex_dispatcher_num_sms": ("deepep", "hybridep"),
    "moe_permute_fusion_into_hybridep": ("hybridep",),
    "moe_hybridep_pad_uneven_dispatch_inputs": ("hybridep",),
    "moe_hybridep_num_blocks_permute": ("hybridep",),
    "moe_hybridep_num_blocks_unpermute": ("hybridep",),
    "moe_hybridep_num_sms_preprocessing": ("hybridep",),
}
DEFAULTS = {field.name: field.default for field in fields(TransformerConfig)}


def most_experts(dynmoe: DynMoEConfig, experts: int) -> int:
    """The most FFN experts that one token can visit."""
    bounds = [experts]
    if dynmoe.max_experts_per_token is not None:
        bounds.append(dynmoe.max_experts_per_token)
    rule = RULES[dynmoe.rule]
    if rule.most is not None:
        bounds.append(rule.most(dynmoe))
    return min(bounds)


def check_flex(config: TransformerConfig, dynmoe: DynMoEConfig) -> None:
    """Refuse what the flex dispatcher cannot serve, and with another dispatcher what only it would read.

    Raises:
        ConfigError: with the field, the value, the reason and the alternative.
    """
    backend = config.moe_flex_dispatcher_backend if config.moe_token_dispatcher_type == "flex" else None
    _check_unread(config, dynmoe, backend)
    if backend is None:
        return
    if backend not in NAMES:
        reason = f"{backend} sends a fixed k rows a token (token_dispatcher.py:1590), whatever the map says"
        instead = "use 'deepep' or 'hybridep', or --moe-token-dispatcher-type alltoall"
        refuse("moe_flex_dispatcher_backend", backend, reason, instead)
    tensor_ranks = config.expert_tensor_parallel_size or config.tensor_model_parallel_size
    _check_shapes(config, NAMES[backend], tensor_ranks)
    if backend == "deepep":
        _check_choices(config, dynmoe, tensor_ranks)
    else:
        _check_hybrid(config)
    _check_installed(backend)


def _check_unread(config: TransformerConfig, dynmoe: DynMoEConfig, backend: str | None) -> None:
    chosen = config.moe_flex_dispatcher_backend
    if backend is None and chosen != DEFAULTS["moe_flex_dispatcher_backend"]:
        instead = "set --moe-token-dispatcher-type flex, or leave it out"
        refuse("moe_flex_dispatcher_backend", chosen, "the flex dispatcher alone reads it", instead)
    for name, readers in READ_BY.items():
        value = getattr(config, name)
        if value != DEFAULTS[name] and backend not in readers:
            reader = f"--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend {readers[-1]}"
            refuse(name, value, f"nothing reads it but {reader}", "set that, or leave it out")
    kind, unit = config.moe_token_dispatcher_type, dynmoe.dispatch_unit
    if kind != "alltoall" and unit not in (("auto",) if backend is None else ("auto", "rank")):
        reason = f"the {kind} dispatcher has a way of its own (a token crosses once for each rank, or to every rank)"
        refuse("moe_dispatch_unit", unit, reason, "leave it at 'auto', or set --moe-token-dispatcher-type alltoall")


def _check_shapes(config: TransformerConfig, library: str, tensor_ranks: int) -> None:
    if tensor_ranks * config.expert_model_parallel_size == 1:
        reason = f"{library} (--moe-flex-dispatcher-backend) moves rows between ranks, and one rank has all experts"
        refuse("expert_model_parallel_size", 1, reason, "use at least 2, or --moe-token-dispatcher-type alltoall")
    if config.params_dtype not in DTYPES:
        reason = f"{library} sums bfloat16 alone, not {config.params_dtype}"
        refuse("bf16", config.bf16, reason, "set --bf16, or --moe-token-dispatcher-type alltoall")
    if config.hidden_size % 16:
        reason = f"{library} copies rows in units of 32 bytes"
        refuse("hidden_size", config.hidden_size, reason, "use a multiple of 16")


def _check_choices(config: TransformerConfig, dynmoe: DynMoEConfig, tensor_ranks: int) -> None:
    sms = config.moe_flex_dispatcher_num_sms
    if sms is not None and sms % 2:
        refuse("moe_flex_dispatcher_num_sms", sms, "DeepEP sends from half of them", "use an even number")
    most, accepted = most_experts(dynmoe, config.num_moe_experts), MOST_CHOICES // tensor_ranks
    capped = "moe_max_experts_per_token"
    if most > accepted:
        shared = f", shared by {tensor_ranks} tensor-parallel ranks" if tensor_ranks > 1 else ""
        reason = f"DeepEP has {MOST_CHOICES} places for the experts of a token{shared}, and {most} could be chosen"
        instead = f"use 1 to {accepted}, or --moe-flex-dispatcher-backend hybridep"
        refuse(capped, dynmoe.max_experts_per_token, reason, instead)
    nodes = tensor_ranks * config.expert_model_parallel_size // NODE_RANKS
    if nodes > MOST_NODES and most > MOST_NODES:
        reason = f"DeepEP sends a token to at most {MOST_NODES} nodes, and {most} experts could be on more of {nodes}"
        instead = f"use 1 to {MOST_NODES}, or an --expert-model-parallel-size within {MOST_NODES} nodes"
        refuse(capped, dynmoe.max_experts_per_token, reason, instead)


def _check_hybrid(config: TransformerConfig) -> None:
    if config.hybrid_context_parallel and not config.moe_hybridep_pad_uneven_dispatch_inputs:
        reason = "HybridEP needs the same number of tokens on every rank, and its sequences are dealt out unevenly"
        refuse("hybrid_context_parallel", True, reason, "add --moe-hybridep-pad-uneven-dispatch-inputs")


def _check_installed(backend: str) -> None:
    name = {"deepep": "fused_dispatch", "hybridep": "hybrid_ep_dispatch"}[backend]
    if getattr(token_dispatcher, name) is not None:
        return
    instead = f"{WHERE[backend]}, or set --moe-token-dispatcher-type alltoall"
    refuse("moe_flex_dispatcher_backend", backend, _why_missing(backend), instead)


def _why_missing(backend: str) -> str:
    try:
        importlib.import_module("deep_ep")
    except Exception as error:  # it looks for its libraries at import, and says in many ways that it misses one
        if isinstance(error, ModuleNotFoundError) and error.name == "deep_ep":
            return f"{NAMES[backend]} is not installed"
        return f"deep_ep is installed but does not import ({' '.join(str(error).split())})"
    return f"the deep_ep that is installed has not what megatron-core needs of {NAMES[backend]} (fused_a2a.py)"


def ranks_per_node(group: dist.ProcessGroup) -> int:
    """Ranks of ``group`` within NVLink of this one: what HybridEP is told, else those on this rank's node.

    Raises:
        ConfigError: the environment variable that tells it is no number of ranks.
    """
    told = os.environ.get(DOMAIN)
    if told is not None:
        if not told.isdecimal() or int(told) < 1:
            reason = f"the environment variable {DOMAIN} is {told!r}"
            refuse("moe_flex_dispatcher_backend", "hybridep", reason, "set it to a number of ranks, or unset it")
        return int(told)
    ranks = dist.get_process_group_ranks(group)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or len(ranks)
    node = dist.get_rank() // local
    return sum(rank // local == node for rank in ranks)


def check_layout(group: dist.ProcessGroup, config: TransformerConfig) -> None:
    """Refuse ranks and experts that HybridEP's buffers cannot be laid out for.

    Args:
        group: all tensor- and expert-parallel ranks.

    Raises:
        ConfigError: see the head of this file.
    """
    size, near, expert_ranks = group.size(), ranks_per_node(group), config.expert_model_parallel_size
    if size % near:
        reason = f"HybridEP divides the {size} tensor- and expert-parallel ranks by the {near} of a node ({DOMAIN})"
        refuse("expert_model_parallel_size", expert_ranks, reason, "use a multiple of a node's ranks")
    local = config.num_moe_experts // expert_ranks
    if local * near % 4:
        reason = f"HybridEP needs a multiple of 4 experts on the ranks of a node, and {near} ranks with {local} are not"
        multiple = expert_ranks * 4 // math.gcd(near, 4)
        refuse("num_experts", config.num_moe_experts, reason, f"use a multiple of {multiple}")


def check_tokens(tokens: int, group: dist.ProcessGroup, config: TransformerConfig, device: torch.device) -> None:
    """Refuse numbers of tokens that HybridEP cannot serve; every rank of ``group`` calls it for the same step.

    Args:
        tokens: T of this rank, in this step.
        device: where a tensor for the group's collectives lives.

    Raises:
        ConfigError: on every rank, if ranks have different numbers; or too many for several nodes.
    """
    if group.size() > ranks_per_node(group) and tokens > MOST_TOKENS_ACROSS_NODES:
        reason = f"{tokens} tokens a rank are more than HybridEP sends between nodes at a time"
        instead = (
            f"use a --micro-batch-size and --seq-length with at most {MOST_TOKENS_ACROSS_NODES}, "
            f"or set {DOMAIN} if all ranks are within NVLink"
        )
        refuse("moe_flex_dispatcher_backend", "hybridep", reason, instead)
    if config.moe_hybridep_pad_uneven_dispatch_inputs:
        return
    counts = torch.empty(group.size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([tokens], device=device), group=group)
    every = counts.tolist()
    fewest, most = min(every), max(every)
    if fewest != most:
        reason = f"HybridEP needs the same number of tokens on every rank, and ranks have {fewest} to {most}"
        refuse("moe_hybridep_pad_uneven_dispatch_inputs", False, reason, "set it, or give ranks equal batches")
