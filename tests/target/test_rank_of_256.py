"""Ranks 0 and 137 of 256: groups, nodes, what a step exchanges, the optimizer's shards, the checkpoint's layout.

Each case is pretrain.sh's command line at 24 layers of toy width, over a fake process group (``tests/target/rank.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from tests import ranks
from tests.target.commands import Command, written
from tests.target.rank import WORLD, Built, Exchanges, answered, built, step

GPUS_A_NODE = 8
EP64 = ("--num-experts", "64", "--expert-model-parallel-size", "64")
# Expert tensor parallelism of 2 as well, which is Megatron's default then.
TP2_PP4 = (
    *("--tensor-model-parallel-size", "2", "--sequence-parallel", "--pipeline-model-parallel-size", "4"),
    *("--moe-dispatch-unit", "expert"),
)


@dataclass(frozen=True)
class Case:
    """A command, the rank that is looked at, and the ranks of its groups, worked out by hand."""

    command: Command
    rank: int
    expert: list[int]  # exchange rows
    replicas: range  # hold the same experts
    tensor: list[int]
    stages: list[int]
    nodes: int  # that the expert-parallel group spans

    @property
    def name(self) -> str:
        """For the test's name."""
        flags = self.command.flags
        layout = "EP 64" if flags == EP64 else "TP 2, EP 8, PP 4" if flags == TP2_PP4 else f"EP 8 {' '.join(flags)}"
        return f"rank {self.rank}, {self.command.model}, {layout}"


def _ep8(model: str, rank: int, *flags: str) -> Case:
    first = rank // 8 * 8
    replicas = range(rank % 8, WORLD, 8)
    return Case(Command(model, WORLD, "local", flags), rank, [*range(first, first + 8)], replicas, [rank], [rank], 1)


def _ep64(model: str, rank: int) -> Case:
    first = rank // 64 * 64
    expert, replicas = [*range(first, first + 64)], range(rank % 64, WORLD, 64)
    return Case(Command(model, WORLD, "local", EP64), rank, expert, replicas, [rank], [rank], 8)


def _tp2_pp4(model: str, rank: int) -> Case:
    """Stages are 64 ranks each; 16 of them in a row hold all experts, halves of each side by side."""
    stage, first = rank // 64 * 64, rank // 16 * 16
    expert = [*range(first + rank % 2, first + 16, 2)]
    replicas = range(stage + rank % 16, stage + 64, 16)
    tensor = [rank // 2 * 2, rank // 2 * 2 + 1]
    return Case(
        Command(model, WORLD, "local", TP2_PP4), rank, expert, replicas, tensor, [*range(rank % 64, WORLD, 64)], 2
    )


CASES = [
    _ep8("dynamic_moe_24l", 0),
    _ep8("dynmoe_24l", 137),
    _ep8("moe_plus_plus_7b", 0),
    _ep8("dynamic_moe_24l", 137, "--moe-preset", "switch"),
    _ep8("dynamic_moe_24l", 0, "--moe-preset", "gshard"),
    _ep8("moe_plus_plus_7b", 137, "--moe-preset", "moe-plus-plus-released"),
    _ep64("dynamic_moe_24l", 137),
    _ep64("moe_plus_plus_7b", 0),
    _tp2_pp4("dynmoe_24l", 0),
    _tp2_pp4("moe_plus_plus_7b", 137),
    _tp2_pp4("dynamic_moe_24l", 137),
]


def check_groups(case: Case) -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state as state

    found = {
        "expert": state.get_expert_model_parallel_group(),
        "replicas": state.get_expert_data_parallel_group(),
        "tensor": state.get_tensor_model_parallel_group(),
        "stages": state.get_pipeline_model_parallel_group(),
    }
    for name, group in found.items():
        assert dist.get_process_group_ranks(group) == list(getattr(case, name)), name
    assert len({rank // GPUS_A_NODE for rank in case.expert}) == case.nodes


def check_step(case: Case, run: Built, seen: Exchanges) -> None:
    """Each layer exchanges counts once, and rows as the counts say: out and back, forward and backward."""
    layers = run.args.num_layers // run.args.pipeline_model_parallel_size
    micro_batches = run.args.global_batch_size // (run.args.micro_batch_size * run.args.data_parallel_size)
    assert len(seen.counts) == layers * micro_batches
    place, ep = case.expert.index(case.rank), len(case.expert)
    experts = run.args.num_experts
    local = experts // ep
    over_experts = [exchange for exchange in seen.rows if exchange[0] == case.expert]
    assert len(over_experts) == 6 * len(seen.counts)  # rows, their weights, outputs; forward and backward
    ours = [exchange[1:] for exchange in over_experts]
    assert all(len(received) == len(sent) == ep for received, sent in ours)
    ways = {(tuple(received), tuple(sent)) for received, sent in ours}
    assert all((sent, received) in ways for received, sent in ways)  # what comes back is what went
    tensor = len(case.tensor)
    first = [rank - case.rank % tensor for rank in case.expert]  # of each tensor-parallel group
    for group, counts in seen.counts:
        assert group == [rank + other for rank in first for other in range(tensor)]
        counts = counts.view(ep, tensor, -1)[:, case.rank % tensor]
        rows_R = counts[:, place * local : (place + 1) * local].sum(dim=1)
        by_expert = tuple(rows_R.tolist()), tuple(counts[place, :experts].view(ep, local).sum(dim=1).tolist())
        by_rank = tuple(counts[:, experts + place].tolist()), tuple(counts[place, experts:].tolist())
        assert {by_expert, by_rank} & ways, "rows on the wire are not those of the counts"


def check_optimizer(case: Case, run: Built) -> None:
    """Each rank steps an equal share of each buffer, at its own place, and every copy has the length of its share."""
    from megatron_dynmoe.mcore.slots import main_copies

    leaves = run.optimizer.chained_optimizers
    sizes = [leaf.data_parallel_group.size() for leaf in leaves]
    assert sorted(set(sizes)) == sorted({run.args.data_parallel_size, len(case.replicas)})
    for leaf, size in zip(leaves, sizes, strict=True):
        rank = leaf.data_parallel_group.rank()
        for buffer, ranges in zip(leaf.buffers, leaf.gbuf_ranges, strict=True):
            (by_bucket,) = ranges.values()
            for bucket, shard in zip(buffer.buckets, by_bucket, strict=True):
                width, rest = divmod(bucket.grad_data.numel(), size)
                places = [where["gbuf_world_in_bucket"] for where in shard["param_map"].values()]
                assert rest == 0 and all(rank * width <= p.start < p.end <= (rank + 1) * width for p in places)
    # raises where a copy or a moment is not as long as this rank's share of its parameter
    held = [list(main_copies(run.optimizer, parameter)) for chunk in run.model for parameter in chunk.parameters()]
    assert {len(copies) for copies in held} <= {0, 1} and any(held)


def check_checkpoint(case: Case, run: Built) -> None:
    """A rank's experts and layers stand at their place in the whole model, and copies say which they are."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = run.model[0].sharded_state_dict(metadata={"dp_cp_group": group})
    apply_factories(state)
    shards = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    local = run.args.num_experts // len(case.expert)
    layers = run.args.num_layers // len(case.stages)
    first_layer, first_expert = case.stages.index(case.rank) * layers, case.expert.index(case.rank) * local
    here = {(first_layer + layer, first_expert + expert) for layer in range(layers) for expert in range(local)}
    experts = [shard for shard in shards if ".experts.experts." in shard.key]
    assert {shard.global_shape[:2] for shard in experts} == {(run.args.num_layers, run.args.num_experts)}
    assert {shard.global_offset[:2] for shard in experts} == here
    assert {shard.replica_id for shard in experts} == {(0, 0, case.replicas.index(case.rank))}
    routers = [shard for shard in shards if shard.key.endswith("mlp.router.weight")]
    assert {shard.global_offset[0] for shard in routers} == {layer for layer, _ in here}
    tensor = len(case.tensor)
    copy = case.rank % (WORLD // len(case.stages)) // tensor
    assert {shard.replica_id for shard in routers} == {(0, case.rank % tensor, copy)}


def check_case(case: Case) -> None:
    with built(case.command, case.rank) as run:
        check_groups(case)
        check_checkpoint(case, run)
        check_optimizer(case, run)
        with answered(run.args.expert_model_parallel_size) as seen:
            step(run)
        check_step(case, run, seen)


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> list[Command]:
    """What pretrain.sh makes of the cases' commands."""
    return written([case.command for case in CASES], tmp_path_factory.mktemp("scripts"))


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_rank(tmp_path, commands, number):
    ranks.call(check_case, replace(CASES[number], command=commands[number]), ranks=1, folder=tmp_path)
