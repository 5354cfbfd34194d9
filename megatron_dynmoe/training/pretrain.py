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
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_dynmoe import host
from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.mcore.adaptation import ExpertAdaptation
from megatron_dynmoe.mcore.checkpoint import check_folder, latest_folder
from megatron_dynmoe.mcore.config import check_config
from megatron_dynmoe.mcore.norm import replace_norms
from megatron_dynmoe.mcore.specs import dynamic_layer_spec
from megatron_dynmoe.mcore.tracker import RoutingTracker
from megatron_dynmoe.training.command_line import read_flags
from megatron_dynmoe.training.datasets import build_datasets, data_prefixes
from megatron_dynmoe.training.failures import refusing_flags, report
from megatron_dynmoe.training.log import MetricsFile, log_evaluation, log_interval
from megatron_dynmoe.training.stacked_experts import check_experts
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
        exit code: 0, 2 after one sentence on what cannot work, or 1 after a sentence and a traceback.
    """
    host.enable()
    try:
        args, dynmoe = read_flags(sys.argv[1:] if argv is None else argv)
        if check_data is not None:
            vocabulary = get_tokenizer().vocab_size
            for prefix in data_prefixes(args):
                check_data(prefix, vocabulary)
        check_load(args)
        run(args, dynmoe)
    except Exception as error:
        return report(error)
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
    config = pretrain_config(args, dynmoe)
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
    pretrain(
        config,
        build_datasets,
        ModelType.encoder_or_decoder,
        partial(forward_step, evaluation=losses, watch=None if adaptation is None else adaptation.watch),
        non_loss_data_func=lambda model: log_evaluation(file, tracker, losses),
    )


def pretrain_config(args: Namespace, dynmoe: DynMoEConfig) -> PretrainConfigContainer:
    """Megatron's configuration of the run, with a dynamic model.

    Raises:
        ConfigError: flags that cannot work, with the reason and the alternative.
    """
    with refusing_flags(args):
        model = gpt_config_from_args(args)
        model.rope_scaling_factor = args.rope_scaling_factor  # which Megatron's own mapping leaves out
        model.transformer_layer_spec = partial(layer_spec, dynmoe=dynmoe)
        if dynmoe.gating_residual and args.pipeline_model_parallel_size > 1:
            model.transformer.variable_seq_lengths = True  # stages tell each other how wide the hidden tensor is
        if args.num_experts:
            check_config(model.transformer, dynmoe)
            check_experts(args, model.transformer, dynmoe)
        return pretrain_cfg_container_from_args(args, model)


def layer_spec(config: GPTModelConfig, vp_stage: int | None = None, *, dynmoe: DynMoEConfig) -> Any:
    """Megatron's own choice of layer spec for ``config``, with its MoE layers made dynamic; dense models stay dense."""
    spec = default_layer_spec(config, vp_stage)
    return replace_norms(spec) if config.num_moe_experts is None else dynamic_layer_spec(spec, dynmoe)
