"""Command-line flags: every field of :class:`DynMoEConfig`, presets, and where metrics go.

A preset is nothing but flags that stand before the user's own, so what the user says wins, and Megatron's flags that
a preset sets (``--moe-router-topk``) keep their meaning.
"""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from dataclasses import Field, fields
from typing import Any

from megatron.training.argument_utils import ArgumentGroupFactory

from megatron_dynmoe.checks import check_division, check_slots
from megatron_dynmoe.config import NAMES, PRESETS, ConfigError, DynMoEConfig, dest_of, flag_of, preset_fields
from megatron_dynmoe.training.resume import add_resume_args


class _DynMoEFlags(ArgumentGroupFactory):
    """One flag a field, ``--moe-`` before its name; fields that Megatron has a flag for add none."""

    def _build_argparse_kwargs_from_field(self, attribute: Field) -> dict[str, Any]:
        kwargs = super()._build_argparse_kwargs_from_field(attribute)
        kwargs |= {"arg_names": [flag_of(attribute.name)], "dest": dest_of(attribute.name)}
        if attribute.type is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        if attribute.name in NAMES:
            kwargs["metavar"] = "{" + ",".join(NAMES[attribute.name]) + "}"
        kwargs["help"] = kwargs["help"].replace("%", "%%") + f" Default: {attribute.default}."
        return kwargs


def add_dynmoe_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags of dynamic MoE to Megatron's parser; pass it as ``extra_args_provider``."""
    shared = [f.name for f in fields(DynMoEConfig) if "megatron" in f.metadata]
    group = _DynMoEFlags(DynMoEConfig, exclude=shared).build_group(parser, title="dynamic MoE")
    group.add_argument(
        "--moe-preset",
        default=None,
        metavar="{" + ",".join(PRESETS) + "}",
        help="Settings of a published system; flags given beside it win.",
    )
    group.add_argument(
        "--moe-metrics-file",
        default=None,
        help="Append one JSON object a log interval and one an evaluation to this file.",
    )
    return add_resume_args(parser)


def expand_preset(argv: list[str]) -> list[str]:
    """The command line with the preset's flags before the user's.

    Raises:
        ConfigError: unknown preset.
    """
    preset = None
    for position, word in enumerate(argv):
        if word == "--moe-preset" and position + 1 < len(argv):
            preset = argv[position + 1]
        elif word.startswith("--moe-preset="):
            preset = word.split("=", 1)[1]
    if preset is None:
        return list(argv)
    flags: list[str] = []
    for name, value in preset_fields(preset).items():
        flags += [flag_of(name)] if value is True else [flag_of(name), str(value)]
    return flags + list(argv)


def prepare_argv(argv: list[str]) -> list[str]:
    """The command line that Megatron parses: the preset expanded, and two switches that are always on.

    Megatron refuses k = 1 unless told that probabilities come before selection (transformer_config.py:2329), which is
    so in all our gates.  On SIGTERM, which Slurm sends before it takes a node back, a run saves and exits.

    Raises:
        ConfigError: unknown preset.
    """
    return ["--moe-router-pre-softmax", "--exit-signal-handler", *expand_preset(argv)]


def dynmoe_from_args(args: Namespace) -> DynMoEConfig:
    """The configuration that the parsed flags say.

    Raises:
        ConfigError: a value that is not accepted, or experts that do not divide by the expert-parallel ranks.
    """
    values = {f.name: getattr(args, dest_of(f.name)) for f in fields(DynMoEConfig)}
    coeff = values["load_balance_coeff"]
    if isinstance(coeff, list):  # Megatron takes one value a balancing type
        if len(coeff) != 1:
            raise ConfigError(f"--moe-aux-loss-coeff is {coeff}; accepted: one number, the load-balance loss's weight.")
        values["load_balance_coeff"] = coeff[0]
    config = DynMoEConfig(**values)
    if args.num_experts is not None:
        check_division(args.num_experts, args.expert_model_parallel_size)
    check_slots(config.initial_experts, args.num_experts or 0)
    return config
