"""The model, the cluster, and the layouts of one on the other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from megatron_dynmoe.checks import divisors
from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.errors import UserError
from megatron_dynmoe.model_shape import ModelShape


class PlanError(UserError):
    """Input that cannot be planned; one sentence with the name, the value and what would be accepted."""


def require(accepted: bool, name: str, value: Any, wanted: str) -> None:
    """Raise :class:`PlanError` unless ``accepted``."""
    if not accepted:
        raise PlanError(f"{name} is {value!r}; accepted: {wanted}.")


@dataclass(frozen=True, kw_only=True)
class Model(ModelShape):
    """A model and its batches; its vocabulary is the one before padding.

    Attributes:
        vocabulary_multiple: the vocabulary is padded to a multiple of this times TP, as Megatron does
            (training/vocab_utils.py).
        sequence: tokens of a sequence. micro_batch, global_batch: sequences.
        itemsize: bytes of an element in the model's dtype: 2 or 4.
        recompute: full recompute: only each layer's input is kept.
        routing: gate, rule and bounds of the routers. init_std: ``--init-method-std``, of their weights.
        fused: (token, expert) rows are permuted by Transformer Engine (``--moe-permute-fusion``).
        torch_kernels: norms and rotary positions by torch (``--transformer-impl local``), which keep more.
        fp8: the experts compute in FP8 by Transformer Engine. wide_ends: but for the first and the last so many layers
            (``--first-last-layers-bf16``). fp8_weights: weights are kept in it too (``--fp8-param-gather``).
    """

    sequence: int
    micro_batch: int
    global_batch: int
    vocabulary_multiple: int = 128
    itemsize: int = 2
    recompute: bool = False
    routing: DynMoEConfig = field(default_factory=DynMoEConfig)
    init_std: float = 0.02
    fused: bool = False
    torch_kernels: bool = False
    fp8: bool = False
    wide_ends: tuple[int, int] = (0, 0)
    fp8_weights: bool = False

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type == "int":
                least = 0 if entry.default == 0 else 1
                require(isinstance(value, int) and value >= least, entry.name, value, f"at least {least}")
        require(len(self.moe) > 0, "layers", 0, "at least 1")
        require(any(self.moe), "moe_layer_freq", "[0, ...]", "a pattern with at least one MoE layer")
        require(self.heads % self.query_groups == 0, "query_groups", self.query_groups, f"a divisor of {self.heads}")
        wanted = f"a multiple of the micro batch, {self.micro_batch}"
        require(self.global_batch % self.micro_batch == 0, "global_batch", self.global_batch, wanted)

    def in_fp8(self, layer: int) -> bool:
        """Whether the experts of ``layer`` compute in FP8."""
        first, last = self.wide_ends
        return self.fp8 and first <= layer < self.layers - last

    @property
    def columns(self) -> int:
        """C: columns of the router, those of zero-computation experts included."""
        return self.experts + self.routing.zero_computation_experts

    def padded_vocabulary(self, tensor: int) -> int:
        """Vocabulary as the embedding of ``tensor`` ranks stores it."""
        multiple = self.vocabulary_multiple * tensor
        return -(-self.vocabulary // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Machines of one kind.

    Attributes:
        nodes, gpus: nodes, and GPUs of each.
        nvlink: bytes/s that a GPU sends (and, at the same time, receives) inside its node.
        network: bytes/s that a GPU sends (and receives) to other nodes.
        flops: floating-point operations/s that a GPU achieves in the model's GEMMs (not the data sheet's peak).
        memory: bytes of one GPU.
    """

    nodes: int
    gpus: int
    nvlink: float
    network: float
    flops: float
    memory: float

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type == "int":
                require(isinstance(value, int) and value >= 1, entry.name, value, "a whole number of at least 1")
            else:
                require(math.isfinite(value) and value > 0, entry.name, value, "a number above 0")

    @property
    def world(self) -> int:
        """All GPUs."""
        return self.nodes * self.gpus


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model lies on a cluster.

    Sequence parallelism is on with TP above 1, and experts are not split by tensor parallelism
    (``--expert-tensor-parallel-size 1``): their ranks are the TP x DP ranks of a pipeline stage.

    Attributes:
        tensor, pipeline, expert, data: TP, PP, EP and DP.
        micro_batches: of one data-parallel rank and step.
    """

    tensor: int
    pipeline: int
    expert: int
    data: int
    micro_batches: int

    @property
    def name(self) -> str:
        """As text."""
        return f"TP{self.tensor} PP{self.pipeline} EP{self.expert} DP{self.data}"

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return self.tensor * self.data

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same experts."""
        return self.stage_ranks // self.expert

    def tokens(self, model: Model) -> float:
        """T: tokens of one rank and micro-batch outside of attention and dense GEMMs (the sequence is split by TP)."""
        return model.sequence * model.micro_batch / self.tensor

    def stage(self, model: Model, index: int) -> range:
        """The layers of pipeline stage ``index``."""
        count = model.layers // self.pipeline
        return range(index * count, (index + 1) * count)

    def nodes_of_expert_groups(self, cluster: Cluster) -> list[tuple[int, ...]]:
        """Node of each rank of an expert-parallel group, for every way in which a group lies across nodes.

        Expert-parallel ranks are neighbours: Megatron orders ranks "tp-cp-ep-dp-pp" with experts' TP of 1
        (parallel_state.py, expert_decoder_rank_generator).
        """
        starts = range(0, cluster.world, self.expert)
        return [
            tuple((start + rank) // cluster.gpus for rank in range(self.expert))
            for start in sorted({start % cluster.gpus for start in starts})
        ]


def _micro_batches(model: Model, world: int, tensor: int, pipeline: int) -> int:
    """Micro-batches of a step; 0 if the batch does not divide."""
    per_round = model.micro_batch * (world // (tensor * pipeline))
    return model.global_batch // per_round if model.global_batch % per_round == 0 else 0


def layouts(model: Model, cluster: Cluster) -> Iterator[Layout]:
    """Every TP x PP x EP that is sensible.

    TP stays within a node and divides heads, query groups, sequence and feed-forward widths; PP divides the layers; EP
    divides the experts and the ranks of a stage; the rest is DP and divides the global batch.
    """
    dense_width = 0 if all(model.moe) else model.dense_width
    split = math.gcd(model.heads, model.query_groups, model.sequence, dense_width, model.shared_width)
    for tensor in divisors(math.gcd(split, cluster.gpus)):
        for pipeline in divisors(math.gcd(model.layers, cluster.world // tensor)):
            count = _micro_batches(model, cluster.world, tensor, pipeline)
            if not count:
                continue
            data = cluster.world // (tensor * pipeline)
            for expert in divisors(math.gcd(model.experts, tensor * data)):
                yield Layout(tensor=tensor, pipeline=pipeline, expert=expert, data=data, micro_batches=count)
