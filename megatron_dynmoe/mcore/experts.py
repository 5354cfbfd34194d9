"""Experts as two stacked weights and grouped GEMMs of torch, interchangeable with megatron-core's experts.

One parameter holds all local experts, so that a GEMM over ragged groups needs no copy.  In a distributed checkpoint
the experts stand one by one under the names of megatron-core's SequentialMLP and TEGroupedMLP: what one backend saved,
the others load.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from megatron.core.utils import divide
from torch import Tensor

from megatron_dynmoe.config import ConfigError
from megatron_dynmoe.experts import grouped_mlp
from megatron_dynmoe.experts.activation import FusedActivation
from megatron_dynmoe.experts.grouped import GroupedLinear


class TorchGroupedMLP(MegatronModule):
    """All local experts in two grouped GEMMs.

    Parameters: ``weight1`` [L, 2F or F, D] (gate rows, then up rows) and ``weight2`` [L, D, F]; F is this rank's share
    under expert tensor parallelism.

    Raises:
        ConfigError: a bias on the linear layers, Transformer Engine's FP8 or FP4: this backend has none of them.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        unsupported = why_not_torch(config)
        if unsupported:
            raise ConfigError(
                f"--moe-expert-backend is 'torch', which {unsupported}; use 'auto', 'te' or 'sequential'."
            )
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        width = divide(config.moe_ffn_hidden_size, self.tp_group.size())
        gated = 2 if config.gated_linear_unit else 1
        self.weight1 = self._weight((gated * width, config.hidden_size), config.init_method, partition_dim=1)
        self.weight2 = self._weight((config.hidden_size, width), config.output_layer_init_method, partition_dim=2)

    def _weight(self, shape: tuple[int, int], init_method: Any, partition_dim: int) -> torch.nn.Parameter:
        device = None if self.config.use_cpu_initialization else torch.cuda.current_device()
        data = torch.empty(self.num_local_experts, *shape, dtype=self.config.params_dtype, device=device)
        weight = torch.nn.Parameter(data)
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=partition_dim, stride=1)
        if self.config.perform_initialization:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()), torch.no_grad():
                for expert in weight:  # one expert at a time: init methods may scale by the matrix's shape
                    init_method(expert)
        return weight

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Rows [N, D] ordered by expert, rows per expert [L] (host), weights [N]; returns ([N, D], no bias)."""
        out = grouped_mlp(
            permuted_local_hidden_states,
            permuted_probs,
            self.weight1,
            self.weight2,
            tokens_per_expert,
            activation=self.config.activation_func,
            gated=self.config.gated_linear_unit,
            offset=self.config.glu_linear_offset,
            fused=fused_activation(self.config),
            linears=self.linears,
        )
        return out, None

    @property
    def linears(self) -> tuple[GroupedLinear, GroupedLinear] | None:
        """What multiplies, by the first weight and by the second; ``None``: the default of :func:`grouped_mlp`."""
        return None

    def expert_state(self, linear: str, index: int) -> Any:
        """What is saved of expert ``index`` beside its weight of ``linear``: nothing."""

    def backward_dw(self) -> None:
        """Nothing is delayed: weight gradients come with the backward pass."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Each weight as a factory that writes the experts one by one, named as megatron-core's experts."""
        if (metadata or {}).get("singleton_local_shards", False):
            raise ConfigError(
                "the checkpoint format with one key an expert (singleton_local_shards) is not served by the torch "
                "experts; use --ckpt-format torch_dist."
            )
        halves = 2 if self.config.gated_linear_unit else 1
        weights = (("weight1", "linear_fc1", halves, 0), ("weight2", "linear_fc2", 1, 1))
        offsets, experts = tuple(sharded_offsets), f"{prefix}experts."
        state: dict[str, Any] = {
            f"{prefix}{name}": self._factory(getattr(self, name), f"{experts}{linear}.weight", offsets, parts, axis)
            for name, linear, parts, axis in weights
        }
        state[f"{prefix}_extra_state"] = {
            linear: self._extra_states(linear, f"{experts}{linear}._extra_state", offsets)
            for _, linear, _, _ in weights
        }
        return state

    def get_extra_state(self) -> Any:
        """Nothing: this backend has no state of its own beside its weights."""

    def set_extra_state(self, state: Any) -> None:
        """Ignores what another backend keeps beside its weights (FP8 scales)."""

    def _extra_states(self, linear: str, key: str, offsets: tuple) -> list[Any]:
        # The other backends have one such object an expert and insist on finding it; theirs may be empty as ours.
        first, experts = self.ep_group.rank() * self.num_local_experts, self.ep_group.size() * self.num_local_experts
        replica = (0, self.tp_group.rank(), self.dp_group.rank())
        return [
            make_sharded_object_for_checkpoint(
                self.expert_state(linear, index), key, (*offsets, (len(offsets), first + index, experts)), replica
            )
            for index in range(self.num_local_experts)
        ]

    def _factory(self, weight: Tensor, key: str, offsets: tuple, parts: int, axis: int) -> ShardedTensorFactory:
        local = self.num_local_experts
        build = partial(
            _build,
            offsets=offsets,
            first=self.ep_group.rank() * local,
            experts=self.ep_group.size() * local,
            parts=parts,
            axis=axis,
            tp=(self.tp_group.rank(), self.tp_group.size()),
        )
        # (pipeline, tensor, data) replica: experts are distinct along the tensor axis, copies along expert-data.
        return ShardedTensorFactory(
            key, weight, build, partial(_merge, parts=parts, axis=axis), (0, 0, self.dp_group.rank())
        )


@torch.no_grad()
def _build(
    key: str,
    weight: Tensor,
    replica_id: tuple[int, int, int],
    flattened_range: Any,
    *,
    offsets: tuple,
    first: int,
    experts: int,
    parts: int,
    axis: int,
    tp: tuple[int, int],
) -> list[ShardedTensor]:
    """[L, a, b] to one shard an expert (two with a gated unit: gate rows, then up rows, of all tensor ranks)."""
    rank, size = tp
    prepended = len(offsets) + 1
    shards = []
    for index, expert in enumerate(weight):
        where = (*offsets, (len(offsets), first + index, experts))
        for part, piece in enumerate(expert.chunk(parts, dim=axis)):
            place = (prepended + axis, part * size + rank, parts * size)
            shards.append(
                ShardedTensor.from_rank_offsets(
                    key, piece, *where, place, replica_id=replica_id, prepend_axis_num=prepended
                )
            )
    return shards


@torch.no_grad()
def _merge(pieces: Sequence[Tensor], *, parts: int, axis: int) -> Tensor:
    experts = [torch.cat(list(pieces[i : i + parts]), dim=axis) for i in range(0, len(pieces), parts)]
    return torch.stack(experts)


def fused_activation(config: TransformerConfig) -> FusedActivation | None:
    """megatron-core's compiled SwiGLU with the row's weight in it (fusions/fused_bias_swiglu.py:261), if it is what
    ``config`` computes and fusion is on (``--no-bias-swiglu-fusion`` turns it off); else ``None``.

    It has the formula of our own, float32 product and sum for the weights' gradient included, and keeps the same two
    tensors; compiled it rounds to the model's dtype less often.
    """
    swiglu = config.gated_linear_unit and config.activation_func is F.silu and config.glu_linear_offset == 0
    return _weighted_swiglu if swiglu and config.bias_activation_fusion else None


def _weighted_swiglu(hidden_NG: Tensor, weights_N: Tensor) -> Tensor:
    return weighted_bias_swiglu_impl(hidden_NG, None, weights_N.unsqueeze(-1))


def why_not_torch(config: TransformerConfig) -> str | None:
    """Why :class:`TorchGroupedMLP` cannot serve ``config``, as the end of a sentence; ``None`` if it can."""
    if config.add_bias_linear:
        return "has no bias (--disable-bias-linear)"
    if config.fp8 or config.fp4:
        return "has an FP8 of its own, --moe-fp8-recipe, and none of --fp8-format's or --fp4-format's"
    if getattr(config, "moe_mlp_glu_interleave_size", None):
        return "does not interleave gate and up rows"
    if config.activation_func_clamp_value is not None:
        return "does not clamp activations"
    if config.activation_func_fp8_input_store:
        return "keeps the activation's input in the model's dtype (activation_func_fp8_input_store)"
    width = config.moe_ffn_hidden_size // (config.expert_tensor_parallel_size or config.tensor_model_parallel_size)
    step = 16 // config.params_dtype.itemsize  # grouped_mm reads rows in units of 16 bytes
    if config.hidden_size % step or width % step:
        return f"needs --hidden-size and --moe-ffn-hidden-size (a rank's share) in multiples of {step}"
    return None
