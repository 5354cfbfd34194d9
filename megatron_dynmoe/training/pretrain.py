"""Pretrain a dynamic MoE language model through ``megatron.training.pretrain``."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.enums import ModelType
from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker
from megatron.training import get_tokenizer, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.config.container import PretrainConfigContainer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dynmoe import host
from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.launch.parent import end_with_parent, under_torchrun
from megatron_dynmoe.mcore.checks import check_config
from megatron_dynmoe.mcore.controllers import Driver
from megatron_dynmoe.mcore.fp8_state import then_update_scales
from megatron_dynmoe.mcore.stages import fix_width
from megatron_dynmoe.mcore.tracker import RoutingTracker
from megatron_dynmoe.routers.auxiliary import losses_of
from megatron_dynmoe.training import fits, nan, report_failure, stop
from megatron_dynmoe.training.batch import get_embedding_ranks
from megatron_dynmoe.training.command_line import read_flags
from megatron_dynmoe.training.datasets import build_datasets, data_prefixes
from megatron_dynmoe.training.failures import describe, refusing_flags
from megatron_dynmoe.training.interval import IntervalSums
from megatron_dynmoe.training.log import MetricsFile, log_evaluation, log_interval
from megatron_dynmoe.training.model import DynamicGPTModelConfig, layer_spec
from megatron_dynmoe.training.resume import Resume
from megatron_dynmoe.training.stacked_experts import check_experts
from megatron_dynmoe.training.step import LossSums, forward_step

# (prefix, vocabulary size) -> None; raises ValueError with one sentence if the data cannot be used.
DataCheck = Callable[[str, int], Any]


def main(argv: list[str] | None = None, *, check_data: DataCheck | None = None) -> int:
    """Parse, check, train.

    Args:
        argv: the command line without the program's name; default: ``sys.argv``.
        check_data: checks each indexed dataset before training starts.

    Returns:
        exit code: 0; after one sentence 2 for what cannot work, 17 for NaN; 1 for everything else, after a sentence and
        a traceback. Where other ranks wait for this one the process ends instead.
    """
    host.enable()
    if under_torchrun():
        end_with_parent()
    done = report_failure.watch()
    try:
        args, dynmoe, resumed = read_flags(sys.argv[1:] if argv is None else argv)
        if check_data is not None:
            vocabulary = get_tokenizer().vocab_size
            for prefix in data_prefixes(args):
                check_data(prefix, vocabulary)
        fits.check_fits(resumed, args, get_tokenizer().vocab_size)
        run(args, dynmoe, resumed)
    except (Exception, CheckpointException) as error:  # torch's is no Exception
        return report_failure.say(*describe(error))
    finally:
        done.set()
    return 0


def run(args: Namespace, dynmoe: DynMoEConfig, resumed: Resume | None = None) -> None:
    """Train as ``args`` say; Megatron is parsed and validated, but not yet initialised."""
    config = pretrain_config(args, dynmoe)
    config.model.fused_norm = fits.fused_norm(resumed)
    file, losses = MetricsFile(args.moe_metrics_file), LossSums()
    driver = Driver(dynmoe, seed=args.seed)
    tracker = RoutingTracker(
        num_layers=args.num_layers + (args.mtp_num_layers or 0),
        num_experts=args.num_experts or 1,
        kinds={kind: getattr(dynmoe, f"{kind}_experts") for kind in ("constant", "copy", "zero")},
        copies=1 if args.sequence_parallel else args.tensor_model_parallel_size,
        log_interval=args.log_interval,
        loss_names=tuple(loss.name for loss in losses_of(dynmoe)),
        on_interval=partial(log_interval, file, driver, IntervalSums()),
        on_step=driver.after_step,
    )
    set_moe_metrics_tracker(tracker)
    datasets: Any = partial(build_datasets, config=config.model.transformer)
    datasets.is_distributed = True  # each rank decides whether it reads
    step = partial(forward_step, evaluation=losses, before=driver.before_pass)
    watch = nan.Watch()
    config.model.transformer.finalize_model_grads_func = then_update_scales(watch.after_gradients)
    try:
        pretrain(
            config,
            stop.ends_at_once(datasets),
            ModelType.encoder_or_decoder,
            guarded(step, watch),
            get_embedding_ranks=partial(get_embedding_ranks, config=config.model.transformer),
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


def pretrain_config(args: Namespace, dynmoe: DynMoEConfig) -> PretrainConfigContainer:
    """Megatron's configuration of the run, with a dynamic model.

    Raises:
        ConfigError: flags that cannot work, with the reason and the alternative.
    """
    with refusing_flags(args):
        model = gpt_config_from_args(args, model_config_cls=DynamicGPTModelConfig)
        model.dynmoe = dynmoe if args.num_experts else None
        model.rope_scaling_factor = args.rope_scaling_factor  # which Megatron's own mapping leaves out
        model.transformer_layer_spec = partial(layer_spec, dynmoe=dynmoe)
        if dynmoe.gating_residual and args.pipeline_model_parallel_size > 1:
            if not model.transformer.variable_seq_lengths:
                model.post_wrap_hooks.append(partial(fix_width, dynmoe=dynmoe))
            model.transformer.variable_seq_lengths = True  # the hidden tensor is wider than the model's configuration
        if args.num_experts:
            check_config(model.transformer, dynmoe)
            check_experts(args, model.transformer, dynmoe)
        return pretrain_cfg_container_from_args(args, model)
