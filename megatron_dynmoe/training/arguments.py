"""Command-line flags: every field of :class:`DynMoEConfig` and its methods, presets, and the metrics file.

A preset is nothing but flags that stand before the user's own, so what the user says wins, and Megatron's flags that
a preset sets (``--moe-router-topk``) keep their meaning.
"""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import Field
from typing import Any

from megatron.training.argument_utils import ArgumentGroupFactory

from megatron_dynmoe.checks import check_division
from megatron_dynmoe.config import PRESETS, ConfigError, DynMoEConfig, dest_of, flag_of, preset_fields, without_unread
from megatron_dynmoe.routers import GATES, RULES
from megatron_dynmoe.routers.registry import Method, methods
from megatron_dynmoe.routers.router_config import all_fields
from megatron_dynmoe.routers.settings import typed_fields
from megatron_dynmoe.training.resume import add_resume_args


class _DynMoEFlags(ArgumentGroupFactory):
    """One flag a field, ``--moe-`` before its name; fields that Megatron has a flag for add none."""

    def _build_argparse_kwargs_from_field(self, attribute: Field) -> dict[str, Any]:
        typed = {field.name: field for field in typed_fields(self.src_cfg_class)}
        kwargs = super()._build_argparse_kwargs_from_field(typed[attribute.name])
        kwargs |= {"arg_names": [flag_of(attribute.name)], "dest": dest_of(attribute.name)}
        if typed[attribute.name].type is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        registries: dict[str, Mapping[str, Method]] = {"gate": GATES, "rule": RULES}
        registry = registries.get(attribute.name, {})
        accepts = list(registry) or attribute.metadata.get("accepts")
        if isinstance(accepts, list):
            kwargs["metavar"] = "{" + ",".join(accepts) + "}"
        for name, method in registry.items():
            kwargs["help"] += f" '{name}': {method.about}"
        kwargs["help"] = kwargs["help"].replace("%", "%%") + f" Default: {attribute.default}."
        return kwargs


def add_dynmoe_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags of dynamic MoE to Megatron's parser; pass it as ``extra_args_provider``."""
    others = {f.name for f in all_fields(DynMoEConfig) if f.metadata.get("megatron")} | {"settings"}
    group = _DynMoEFlags(DynMoEConfig, exclude=list(others)).build_group(parser, title="dynamic MoE")
    for kind, name, method in methods():
        if method.settings is not None:
            _DynMoEFlags(method.settings, exclude=list(others)).build_group(parser, title=f"dynamic MoE, {kind} {name}")
            others |= set(method.settings.__dataclass_fields__)
    group.add_argument(
        "--moe-preset",
        default=None,
        metavar="{" + ",".join(PRESETS) + "}",
        help="Settings of a published system; flags given beside it win.",
    )
    group.add_argument(
        "--moe-plugin",
        action="extend",
        nargs="+",
        default=None,
        metavar="PACKAGE.MODULE",
        help="Import these modules, which register methods; installed plug-ins are found without.",
    )
    group.add_argument(
        "--moe-metrics-file",
        default=None,
        help="Append one JSON object a log interval and one an evaluation to this file.",
    )
    return add_resume_args(parser)


def _last(argv: list[str], flag: str) -> str | None:
    """What the command line says last after ``flag``, or with = behind it."""
    value = None
    for word, after in zip(argv, [*argv[1:], None], strict=True):
        if word == flag and after is not None:
            value = after
        elif word.startswith(f"{flag}="):
            value = word.split("=", 1)[1]
    return value


def expand_preset(argv: list[str]) -> list[str]:
    """The command line with the preset's flags before the user's.

    Raises:
        ConfigError: unknown preset.
    """
    said = {name: _last(argv, f"--moe-{name}") for name in ("preset", "gate", "rule")}
    preset = said.pop("preset")
    if preset is None:
        return list(argv)
    flags: list[str] = []
    chosen = {name: value for name, value in said.items() if value is not None}
    for name, value in without_unread(preset_fields(preset), chosen).items():
        flag = flag_of(name)
        if isinstance(value, bool):
            flags += [flag if value else flag.replace("--", "--no-", 1)]
        elif value is not None:  # unset is the default
            flags += [flag, str(value)]
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
    values = {f.name: getattr(args, dest_of(f.name)) for f in all_fields(DynMoEConfig)}
    coeff = values["load_balance_coeff"]
    if isinstance(coeff, list):  # Megatron takes one value a balancing type
        if len(coeff) != 1:
            raise ConfigError(f"--moe-aux-loss-coeff is {coeff}; accepted: one number, the load-balance loss's weight.")
        values["load_balance_coeff"] = coeff[0]
    config = DynMoEConfig(**values)
    if args.num_experts is not None:
        check_division(args.num_experts, args.expert_model_parallel_size)
        config.check_columns(args.num_experts)
    return config
