"""Whether the checkpoint that will be loaded fits this run."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_dynmoe.checkpoint import CheckpointError
from megatron_dynmoe.checkpoint.compare import (
    check_function,
    check_implementation,
    check_optimizer,
    check_tokenizer,
    check_vocabulary,
)
from megatron_dynmoe.checkpoint.index import read_index
from megatron_dynmoe.training.arguments import dynmoe_from_args
from megatron_dynmoe.training.resume import Resume, note


def check_fits(resume: Resume | None, args: Namespace, vocab_size: int) -> None:
    """Hold this run's arguments, validated, against those of the checkpoint.

    Raises:
        CheckpointError: it would be another model, function, vocabulary or optimizer, or lacks what megatron looks for.
    """
    if resume is None or resume.state is None or not isinstance(saved := resume.state.get("args"), Namespace):
        return
    check_implementation(saved, args)
    allow = args.moe_allow_routing_change
    for change in check_function(saved, args, allow=allow) + check_tokenizer(saved, args, allow=allow):
        note(change)
    _check_controllers(resume, args)
    check_vocabulary(saved, vocab_size)
    fresh = args.finetune or args.no_load_optim or saved.no_save_optim or resume.folder.name == "release"
    if not fresh:
        state = resume.state.get("opt_param_scheduler")
        check_optimizer(saved, args, _schedule(args), state if isinstance(state, dict) else {})


def _check_controllers(resume: Resume, args: Namespace) -> None:
    """What a router's controllers keep must be there; what they kept and nobody reads any more is said.

    Raises:
        CheckpointError: naming the controller and what is missing.
    """
    mark = ".mlp.router."
    try:
        keys = [key for key in read_index(resume.folder).state_dict_metadata if not key.startswith("optimizer.")]
    except CheckpointError:  # another format
        return
    saved = {key.rpartition(mark)[2] for key in keys if mark in key}
    if not args.num_experts or not saved:
        return
    dynmoe = dynmoe_from_args(args)
    columns = args.num_experts + dynmoe.zero_computation_experts
    read = {"weight", "bias", "gate_map"}
    for method in dynmoe.methods:
        read |= set(method.parameters(dynmoe, columns, args.hidden_size) if method.parameters else ())
    for kind in dynmoe.controllers:
        state = kind(dynmoe, columns, args.hidden_size).state()
        if missing := [name for name in state if name not in saved]:
            raise CheckpointError(
                f"{resume.folder} has no {', '.join(missing)} of the routers, which the controller {kind.__name__} "
                f"keeps; it was written without {kind.flag or 'it'}, and can only be resumed without."
            )
        read |= set(state)
    if unread := sorted(saved - read):
        note(
            f"{resume.folder} has {', '.join(unread)} of the routers, which nothing in this run reads; it is left out."
        )


def fused_norm(resume: Resume | None) -> bool | None:
    """Whether the checkpoint names norms before experts as fused ones (mcore/specs.py); ``None``: it does not say."""
    try:
        keys = read_index(resume.folder).state_dict_metadata if resume else ()
    except CheckpointError:  # another format, or one that is loaded on trust
        return None
    if any(".pre_mlp_layernorm." in key for key in keys):
        return False
    return True if any(".mlp.router." in key for key in keys) else None


def _schedule(args: Namespace) -> dict[str, Any]:
    """The schedule as megatron makes it (training.py:1906), before it is made."""
    samples = not args.train_iters
    scale = 1 if samples else args.global_batch_size
    total = args.train_samples if samples else args.train_iters
    decay = ((args.lr_decay_samples if samples else args.lr_decay_iters) or total) * scale
    warmup = (args.lr_warmup_samples if samples else args.lr_warmup_iters) * scale
    return {
        "max_lr": args.lr,
        "min_lr": args.min_lr,
        "lr_warmup_steps": warmup if args.lr_warmup_fraction is None else args.lr_warmup_fraction * decay,
        "lr_decay_steps": decay,
        "lr_decay_style": args.lr_decay_style,
        "start_wd": args.start_weight_decay,
        "end_wd": args.end_weight_decay,
        "wd_incr_steps": total * scale,
        "wd_incr_style": args.weight_decay_incr_style,
    }
