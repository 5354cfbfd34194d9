"""Pretrain a dynamic MoE language model through ``megatron.training.pretrain``."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.enums import ModelType
from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker
from megatron.training import get_tokenizer, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args, parse_args
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dynmoe import host
from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.launch import outcome
from megatron_dynmoe.launch.parent import end_with_parent, under_torchrun
from megatron_dynmoe.mcore.adaptation import ExpertAdaptation
from megatron_dynmoe.mcore.checkpoint import check_folder, latest_folder
from megatron_dynmoe.mcore.norm import replace_norms
from megatron_dynmoe.mcore.specs import dynamic_layer_spec
from megatron_dynmoe.mcore.tracker import RoutingTracker
from megatron_dynmoe.training import nan, report_failure, stop
from megatron_dynmoe.training.arguments import add_dynmoe_args, dynmoe_from_args, prepare_argv
from megatron_dynmoe.training.datasets import build_datasets, data_prefixes
from megatron_dynmoe.training.log import MetricsFile, log_evaluation, log_interval
from megatron_dynmoe.training.step import LossSums, forward_step

# Losses that Megatron does not know of, by the first part of their name.
OWN_LOSSES = ("entropy", "diversity", "simplicity", "efficiency")

# (prefix, vocabulary size) -> None; raises ValueError with one sentence if the data cannot be used.
DataCheck = Callable[[str, int], Any]


def main(argv: list[str] | None = None, *, check_data: DataCheck | None = None) -> int:
    """Parse, check, train.

    Args:
        argv: the command line without the program's name; default: ``sys.argv``.
        check_data: checks each indexed dataset before training starts.

    Returns:
        exit code: 0, or after one sentence 2 for what cannot work, 17 for NaN, 1 for everything else. Where other ranks
        wait for this one the process ends instead.
    """
    host.enable()
    if under_torchrun():
        end_with_parent()
    done = report_failure.watch()
    try:
        argv = prepare_argv(sys.argv[1:] if argv is None else argv)
        sys.argv[1:] = [*host.default_flags(), *argv]
        dynmoe = dynmoe_from_args(parse_args(add_dynmoe_args))  # before Megatron's own checks, which use assertions
        args = parse_and_validate_args(add_dynmoe_args)
        if check_data is not None:
            vocabulary = get_tokenizer().vocab_size
            for prefix in data_prefixes(args):
                check_data(prefix, vocabulary)
        check_load(args)
        run(args, dynmoe)
    except ValueError as error:
        return report_failure.say(str(error), outcome.REFUSED)
    except (CheckpointException, CheckpointingException) as error:
        reason = str(error).strip().splitlines()[-1]
        return report_failure.say(f"the checkpoint in {args.load} cannot be loaded or saved: {reason}", outcome.REFUSED)
    except nan.NotANumberError as error:
        return report_failure.say(str(error), error.code)
    except Exception as error:
        if isinstance(error, RuntimeError) and (sentence := nan.refused_unwatched(error)):
            return report_failure.say(sentence, outcome.NOT_A_NUMBER)
        return report_failure.say(f"{type(error).__name__}: {error}", 1, error)
    finally:
        done.set()
    return 0


def check_load(args: Namespace) -> None:
    """Look at the checkpoint that ``--load`` names.

    Raises:
        CheckpointError: it is damaged.
    """
    if args.load is None:
        return
    folder = latest_folder(args.load, args.ckpt_step)
    if folder is not None:
        check_folder(folder)


def run(args: Namespace, dynmoe: DynMoEConfig) -> None:
    """Train as ``args`` say; Megatron is parsed and validated, but not yet initialised."""
    model = gpt_config_from_args(args)
    model.transformer_layer_spec = partial(layer_spec, dynmoe=dynmoe)
    if dynmoe.gating_residual and args.pipeline_model_parallel_size > 1:
        model.transformer.variable_seq_lengths = True  # stages tell each other how wide the hidden tensor is
    file, losses = MetricsFile(args.moe_metrics_file), LossSums()
    adaptation = ExpertAdaptation(dynmoe, seed=args.seed) if dynmoe.adaptive_experts else None
    tracker = RoutingTracker(
        num_layers=args.num_layers + (args.mtp_num_layers or 0),
        num_experts=args.num_experts or 1,
        free={kind: getattr(dynmoe, f"{kind}_experts") for kind in ("constant", "copy", "zero")},
        copies=1 if args.sequence_parallel else args.tensor_model_parallel_size,
        log_interval=args.log_interval,
        loss_names=tuple(f"{name}_loss" for name in OWN_LOSSES if getattr(dynmoe, f"{name}_coeff") > 0),
        on_interval=partial(log_interval, file, adaptation),
        on_step=None if adaptation is None else adaptation.after_step,
    )
    set_moe_metrics_tracker(tracker)
    step = partial(forward_step, evaluation=losses, watch=None if adaptation is None else adaptation.watch)
    watch = nan.Watch()
    model.transformer.finalize_model_grads_func = watch.after_gradients
    try:
        pretrain(
            pretrain_cfg_container_from_args(args, model),
            stop.ends_at_once(build_datasets),
            ModelType.encoder_or_decoder,
            guarded(step, watch),
            non_loss_data_func=lambda model: log_evaluation(file, tracker, losses),
        )
    except AssertionError as error:
        if not stop.was_cut_short(error):
            raise


def guarded(step: Callable[..., Any], watch: nan.Watch) -> Callable[..., Any]:
    """``step``, a forward step, after a look at SIGTERM and at NaN."""

    def guarded_step(data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        stop.before_step(model.training)
        watch.before_step(model)
        return step(data_iterator, model, *args, **kwargs)

    return guarded_step


def layer_spec(config: GPTModelConfig, vp_stage: int | None = None, *, dynmoe: DynMoEConfig) -> Any:
    """Megatron's own choice of layer spec for ``config``, with its MoE layers made dynamic; dense models stay dense."""
    spec = default_layer_spec(config, vp_stage)
    return replace_norms(spec) if config.num_moe_experts is None else dynamic_layer_spec(spec, dynmoe)
