"""One forward step of language-model pretraining: a batch, the model, the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.parallel_state import get_context_parallel_group
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import get_args, get_timers
from megatron.training.utils.common_utils import is_first_or_last_pipeline_stage
from torch import Tensor

KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def get_batch(data_iterator: Iterator, vp_stage: int | None) -> dict[str, Tensor | None]:
    """This rank's share of the next micro-batch: int64 tokens, labels, position ids [B, S], float loss mask [B, S].

    Pipeline stages between the first and the last need no batch and get ``None`` for each.
    """
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(KEYS)
    batch = next(data_iterator)
    batch = {key: batch[key].cuda(non_blocking=True) if key in batch else None for key in KEYS}
    # Without a group the split would be over all ranks.
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=get_context_parallel_group())


class LossSums:
    """Adds up the loss of evaluation batches, so that it can be written beside the routing of the same tokens."""

    def __init__(self) -> None:
        self.loss_and_tokens: Tensor | None = None

    def add(self, loss_and_tokens: Tensor) -> None:
        """Add [sum of losses, number of tokens], float."""
        if self.loss_and_tokens is None:
            self.loss_and_tokens = torch.zeros_like(loss_and_tokens)
        self.loss_and_tokens += loss_and_tokens

    def take(self) -> Tensor | None:
        """The sums so far; they start again from zero."""
        sums, self.loss_and_tokens = self.loss_and_tokens, None
        return sums


def loss_func(
    loss_mask: Tensor, output: Tensor, *, evaluation: LossSums | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of token losses under the mask, number of tokens, and both for the log.

    Args:
        loss_mask: float [B, S].
        output: token losses [B, S].
        evaluation: where to add the sums; ``None`` while training.
    """
    mask = loss_mask.reshape(-1).float()
    loss = (output.reshape(-1).float() * mask).sum()
    num_tokens = mask.sum().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        get_rerun_state_machine().validate_result(
            result=loss,
            rejection_func=torch.isnan,
            message="found NaN in local forward loss calculation",
            tolerance=0.0,
            fatal=True,
        )
    report = torch.stack([loss.detach(), num_tokens.to(loss.dtype)])
    if evaluation is not None:
        evaluation.add(report)
    return loss, num_tokens, {"lm loss": report}


def forward_step(
    data_iterator: Iterator, model: GPTModel, *, evaluation: LossSums, watch: Callable[[GPTModel], None] | None = None
) -> tuple[Tensor, Callable[[Tensor], tuple]]:
    """Run one micro-batch through this stage of the model; ``watch`` is told of the stage before."""
    if watch is not None:
        watch(model)
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    output = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    return output, partial(loss_func, batch["loss_mask"], evaluation=None if model.training else evaluation)
