"""One forward step of language-model pretraining: a batch, the model, the loss.

It does what Megatron's own GPT entry does, which is not in Megatron's wheel, with Megatron's functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model, get_model_config
from megatron.training import get_args, get_timers
from megatron.training.distillation import LossFuncCallable
from torch import Tensor

from megatron_dynmoe.training.batch import get_batch, packed_sequences

# A loss is spiky that is so many times the greatest one seen, as in Megatron's own entry.
SPIKY_LOSS_FACTOR = 10

_stragglers = StragglerDetector()


class LossSums:
    """Adds up the loss of evaluation batches, so that it can be written beside the routing of the same tokens."""

    def __init__(self) -> None:
        self.loss_and_tokens: Tensor | None = None
        self.taken = 0  # evaluations so far, each of one set

    def add(self, loss_and_tokens: Tensor) -> None:
        """Add [sum of losses, number of tokens], float."""
        if self.loss_and_tokens is None:
            self.loss_and_tokens = torch.zeros_like(loss_and_tokens)
        self.loss_and_tokens += loss_and_tokens

    def take(self) -> Tensor | None:
        """The sums so far; they start again from zero."""
        sums, self.loss_and_tokens = self.loss_and_tokens, None
        self.taken += 1
        return sums


def loss_func(
    loss_mask: Tensor, output: Tensor, *, model: GPTModel, evaluation: LossSums | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of token losses under the mask, number of tokens, and both for the log.

    Args:
        loss_mask: float [B, S].
        output: token losses [B, S].
        model: that made ``output``; with ``--logits-load-dir`` its logits are compared with the teacher's.
        evaluation: where to add the sums; ``None`` while training.
    """
    if get_args().logits_load_dir is not None:
        loss, num_tokens, report = _distillation_loss()(loss_mask, output, model=model)
    else:
        mask = loss_mask.reshape(-1).float()
        loss = (output.reshape(-1).float() * mask).sum()
        num_tokens = mask.sum().to(torch.int)
        report = {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])}
    _validate(loss)
    if evaluation is not None:
        evaluation.add(report["lm loss"])
    return loss, num_tokens, report


@cache
def _distillation_loss() -> LossFuncCallable:
    """Megatron's loss against a teacher's stored logits; it reads them in order, so there is one in a run."""
    args = get_args()
    return LossFuncCallable(
        logprobs_dir=args.logits_load_dir,
        decode_threads=args.logits_load_decode_threads,
        prefetch_factor=args.logits_load_prefetch_factor,
        kd_loss_alpha=args.logits_load_kd_loss_alpha,
        ignore_errors=args.logits_load_ignore_errors,
        msc_prefetch_depth=args.logits_load_msc_prefetch_depth,
    )


def _validate(loss: Tensor) -> None:
    """The checks of Megatron's entry on this rank's loss, before it is averaged."""
    args, machine = get_args(), get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for name, reject in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            machine.validate_result(
                result=loss,
                rejection_func=reject,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    if args.check_for_spiky_loss:
        machine.validate_result(
            result=loss,
            rejection_func=partial(machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )


def forward_step(
    data_iterator: Iterator,
    model: GPTModel,
    return_schedule_plan: bool = False,
    *,
    evaluation: LossSums,
    before: Callable[[GPTModel], None] | None = None,
) -> tuple[Any, Callable[[Tensor], tuple]]:
    """Run one micro-batch through this stage of the model; ``before`` is told of the stage first.

    With ``return_schedule_plan`` (``--overlap-moe-expert-parallel-comm``) the first result is the plan, not run yet.
    """
    if before is not None:
        before(model)
    args, timers = get_args(), get_timers()
    timers("batch-generator", log_level=2).start()
    with _stragglers(bdata=True):
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        size = args.micro_batch_size if model.training else args.eval_micro_batch_size
        batch = get_batch(data_iterator, get_model_config(model), vp_stage=vp_stage, micro_batch_size=size)
        packed = packed_sequences(batch, count=model.training and not vp_stage)
    timers("batch-generator").stop()
    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    targets = {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}
    with _stragglers:
        if return_schedule_plan:
            output = get_attr_wrapped_model(model, "build_schedule_plan")(*inputs, packed_seq_params=packed, **targets)
        else:
            output = model(*inputs, packed_seq_params=packed, **targets)
    evaluated = None if model.training else evaluation
    return output, partial(loss_func, batch["loss_mask"], model=model, evaluation=evaluated)
