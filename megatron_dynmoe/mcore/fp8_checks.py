"""Whether the torch experts can compute in FP8 as they are told, on this machine: checked before a layer is built.

megatron's ``--fp8-format`` means Transformer Engine: with it attention and dense layers are in FP8, too, and megatron
refuses experts beside it where Transformer Engine is missing (transformer_config.py:2294).  So the torch experts have a
flag of their own, ``--moe-fp8-recipe``, and everything else stays in the model's dtype.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dynmoe.checks import refuse
from megatron_dynmoe.config import ConfigError, DynMoEConfig, dest_of
from megatron_dynmoe.experts.fp8 import Fp8Recipe
from megatron_dynmoe.experts.fp8_rowwise import MULTIPLE

_HOPPER = (9, 0)  # what the row-wise kernel is compiled for


def recipe_of(dynmoe: DynMoEConfig) -> Fp8Recipe | None:
    """The recipe of the torch experts; ``None``: they compute in the model's dtype."""
    if dynmoe.fp8_recipe == "none":
        return None
    by_itself = "hybrid" if dynmoe.fp8_recipe in ("delayed", "tensorwise") else "e4m3"
    return Fp8Recipe(
        scaling=dynmoe.fp8_recipe,
        format=by_itself if dynmoe.fp8_format == "auto" else dynmoe.fp8_format,
        margin=dynmoe.fp8_margin,
        amax_history_len=dynmoe.fp8_amax_history_len,
        amax_compute_algo=dynmoe.fp8_amax_compute_algo,
        wgrad=dynmoe.fp8_wgrad,
    )


def check_fp8(config: TransformerConfig, dynmoe: DynMoEConfig) -> None:
    """Refuse an FP8 recipe that the torch experts, or this machine, cannot serve.

    Raises:
        ConfigError: names the flag, its value, the reason and what to do instead.
    """
    recipe = recipe_of(dynmoe)
    if recipe is None:
        if not (config.fp8_wgrad or config.fp8):
            raise ConfigError(
                "--no-fp8-wgrad cannot be honoured: nothing is in FP8; add --moe-fp8-recipe, or leave it out."
            )
        return
    if config.fp8 or config.fp4:
        name = "--fp8-format" if config.fp8 else "--fp4-format"
        _refuse(dynmoe, "fp8_recipe", f"{name} has Transformer Engine compute the experts", "give one of the two")
    if dynmoe.expert_backend not in ("auto", "torch"):
        reason = f"--moe-expert-backend {dynmoe.expert_backend} does not read it"
        _refuse(dynmoe, "fp8_recipe", reason, "use --moe-expert-backend torch, or --fp8-format with Transformer Engine")
    if config.first_last_layers_bf16:
        for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            if not 0 <= getattr(config, name) <= config.num_layers:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {getattr(config, name)}; accepted: 0 to the number of layers, "
                    f"{config.num_layers}."
                )
    if torch.cuda.is_available() and not dynmoe.fp8_emulate:
        _check_kernel(config, dynmoe, recipe)


def _check_kernel(config: TransformerConfig, dynmoe: DynMoEConfig, recipe: Fp8Recipe) -> None:
    """What torch's grouped kernel takes."""
    if recipe.scaling != "rowwise":
        reason = "on a GPU torch has a grouped kernel for 'rowwise' alone"
        instead = (
            f"use --fp8-format with --fp8-recipe {recipe.scaling} and Transformer Engine, 'rowwise', or (slow, for "
        )
        _refuse(dynmoe, "fp8_recipe", reason, instead + "comparisons) --moe-fp8-emulate")
    if recipe.format != "e4m3":
        _refuse(dynmoe, "fp8_format", "torch's grouped kernel takes e4m3 alone", "use e4m3, or --moe-fp8-emulate")
    found = torch.cuda.get_device_capability()
    if found != _HOPPER:
        reason = f"torch's row-wise grouped kernel is for compute capability 9.0 (Hopper), this GPU has {found}"
        _refuse(dynmoe, "fp8_recipe", reason, "use --fp8-format with Transformer Engine, or --moe-fp8-emulate")
    if config.params_dtype != torch.bfloat16:
        _refuse(dynmoe, "fp8_recipe", "torch's grouped kernel writes bfloat16", "add --bf16, or --moe-fp8-emulate")
    width = config.moe_ffn_hidden_size // (config.expert_tensor_parallel_size or config.tensor_model_parallel_size)
    for name, value in (("--hidden-size", config.hidden_size), ("--moe-ffn-hidden-size (a rank's share)", width)):
        if value % MULTIPLE:
            reason = f"{name} is {value}, and torch's grouped kernel takes multiples of {MULTIPLE}"
            _refuse(dynmoe, "fp8_recipe", reason, "change it, or set --moe-fp8-emulate")


def _refuse(dynmoe: DynMoEConfig, name: str, reason: str, instead: str) -> NoReturn:
    refuse(dest_of(name), getattr(dynmoe, name), reason, instead)
