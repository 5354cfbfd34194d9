"""One rank of 256 without the others: Megatron's own set-up and step over a fake process group.

Collectives return at once.  Two are answered here: the exchange of counts, which decides about shapes, as if other
ranks had routed rows of their own, and the exchange of rows, with small numbers.  (torch's fake group refuses to
receive where nothing is sent, which gloo and NCCL do not.)  What the others leave in their buffers means nothing.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.target.arguments import rank_of, read
from tests.target.commands import Command

WORLD = 256
SEQUENCE = 16
SMALL = f"""
    --fake-process-group --num-layers 24 --hidden-size 32 --ffn-hidden-size 48 --moe-ffn-hidden-size 16
    --num-attention-heads 4 --seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} --vocab-size 127
    --make-vocab-size-divisible-by 8 --eval-iters 0
""".split()


class Done:
    """A collective that is over."""

    def wait(self) -> None:
        """It is over."""


@dataclass
class Exchanges:
    """What went over the expert-parallel group: (its ranks, rows received from each, rows sent to each), in order."""

    counts: list[tuple[list[int], torch.Tensor]] = field(default_factory=list)
    rows: list[tuple[list[int], list[int], list[int]]] = field(default_factory=list)


@dataclass
class Built:
    """A rank's model chunk, optimizer and the rest of what a step needs."""

    args: Any
    config: Any
    model: list[Any]
    optimizer: Any
    scheduler: Any


def _made_up(ranks: int, width: int, expert_ranks: int, generator: torch.Generator) -> torch.Tensor:
    """[ranks, E + R] counts: 0 to 3 rows an expert, of each sender's first tokens, so that pairs are their maximum."""
    rows = torch.randint(0, 4, (ranks, width - expert_ranks), generator=generator)
    return torch.cat([rows, rows.view(ranks, expert_ranks, -1).amax(dim=-1)], dim=1)


def _mark(weights_ML: torch.Tensor, received: list[int], counts: torch.Tensor, rank: int) -> None:
    """As many weights of each sender for each local expert as the counts say."""
    local = weights_ML.shape[1]
    for part, rows in zip(weights_ML.split(received), counts[:, rank * local : (rank + 1) * local], strict=True):
        part.masked_fill_(torch.arange(len(part)).unsqueeze(1) >= rows, -torch.inf)


@contextlib.contextmanager
def answered(expert_ranks: int) -> Iterator[Exchanges]:
    """Counts and rows of other ranks, made up; of counts this rank's own stand in its place."""
    seen = Exchanges()
    gather = dist.all_gather_into_tensor
    generator = torch.Generator().manual_seed(0)

    def gather_counts(out: torch.Tensor, mine: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        if mine.dtype != torch.int64:
            return gather(out, mine, group=group, async_op=async_op)
        ranks = dist.get_process_group_ranks(group)
        made_up = _made_up(len(ranks), mine.numel(), expert_ranks, generator)
        made_up[dist.get_rank(group)] = mine
        out.view(len(ranks), -1).copy_(made_up)
        seen.counts.append((ranks, made_up))
        return Done()

    def exchange_rows(out: torch.Tensor, rows: torch.Tensor, received: Any, sent: Any, **kwargs: Any) -> Any:
        assert (out.shape[0], rows.shape[0]) == (sum(received), sum(sent))
        out.fill_(0.01)
        if rows.dim() == 2 and rows.isneginf().any():  # weights beside per-rank rows, of which -inf says "not chosen"
            _mark(out, received, seen.counts[-1][1], dist.get_rank(kwargs["group"]))
        seen.rows.append((dist.get_process_group_ranks(kwargs["group"]), list(received), list(sent)))
        return Done()

    def exchange_messages(moves: list[dist.P2POp]) -> list[Done]:
        for move in moves:
            if move.op is dist.irecv:
                move.tensor.detach().fill_(0.01)
        return [Done() for _ in moves]

    with (
        mock.patch.object(dist, "all_gather_into_tensor", gather_counts),
        mock.patch.object(dist, "all_to_all_single", exchange_rows),
        mock.patch.object(dist, "batch_isend_irecv", exchange_messages),
    ):
        yield seen


@contextlib.contextmanager
def built(command: Command, rank: int, *more: str) -> Iterator[Built]:
    """Model and optimizer of one rank, as Megatron's training makes them, in small and on the CPU."""
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import setup_model_and_optimizer

    with (
        contextlib.redirect_stdout(io.StringIO()),
        read(command, *SMALL, *more, machine=rank_of(command, rank)) as (args, _, config),
    ):
        initialize_megatron()
        model, optimizer, scheduler = setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=config,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        yield Built(args, config, model, optimizer, scheduler)


def batches(size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of ``size`` sequences, as the data loader gives them."""
    tokens = torch.arange(size * SEQUENCE).view(size, SEQUENCE) % 100
    while True:
        yield {
            "tokens": tokens,
            "labels": tokens + 1,
            "loss_mask": torch.ones(size, SEQUENCE),
            "position_ids": torch.arange(SEQUENCE).expand(size, -1),
            "attention_mask": torch.ones(size, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1),
        }


def step(run: Built) -> None:
    """One training step, Megatron's own; the numbers mean nothing."""
    from functools import partial

    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.training.training import train_step

    from megatron_dynmoe.training.step import LossSums, forward_step

    for chunk in run.model:
        chunk.train()
    run.config.model.transformer.grad_scale_func = run.optimizer.scale_loss
    train_step(
        partial(forward_step, evaluation=LossSums()),
        RerunDataIterator(batches(run.args.micro_batch_size)),
        run.model,
        run.optimizer,
        run.scheduler,
        run.config.model.transformer,
        get_forward_backward_func(),
    )
