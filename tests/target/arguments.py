"""The way of a command line on a machine that is not there: Hopper GPUs, Transformer Engine, with or without apex."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from tests.target.commands import Command

APEX = "fused_weight_gradient_mlp_cuda"
# Kernels of Transformer Engine for which Megatron's configuration looks: module of megatron.core, and how they begin.
_KERNELS = {"models.common.embeddings.rope_utils": "fused_apply_rotary", "transformer.moe.moe_utils": "fused_"}
# The tokenizer's file is empty; a vocabulary as large as LLaMA-2's instead.
_TOKENIZER = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "31999")


def _present(name: str) -> dict[str, ModuleType]:
    """A module that ``find_spec`` finds, for ``sys.modules``; nothing where it is installed."""
    if importlib.util.find_spec(name) is not None:
        return {}
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    return {name: module}


@contextlib.contextmanager
def _kernels() -> Iterator[None]:
    """Something stands where Megatron finds no kernel of Transformer Engine; it is not to be called."""
    with contextlib.ExitStack() as undo:
        for name, start in _KERNELS.items():
            module = importlib.import_module(f"megatron.core.{name}")
            missing = [kernel for kernel, value in vars(module).items() if kernel.startswith(start) and value is None]
            for kernel in missing:
                undo.enter_context(mock.patch.object(module, kernel, NotImplemented))
        yield


@contextlib.contextmanager
def rank_of(command: Command, rank: int = 0) -> Iterator[None]:
    """The environment of one rank of a command; torch's collectives stay away."""
    from megatron_dynmoe.training import resume

    environment = {"WORLD_SIZE": str(command.world), "RANK": str(rank), "LOCAL_RANK": str(rank % 8)}
    if command.queues:
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = command.queues
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(sys, "argv", ["pretrain_dynmoe.py"]),
        mock.patch.object(resume, "prepare", lambda args: None),  # there is no checkpoint, and nobody to ask
    ):
        if not command.queues:
            os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
        yield


@contextlib.contextmanager
def hopper(command: Command) -> Iterator[None]:
    """A machine with H100s and Transformer Engine, as far as checks of flags ask."""
    from megatron.core import utils
    from packaging.version import Version

    from megatron_dynmoe import host

    modules = _present("transformer_engine") | (_present(APEX) if command.apex else {})
    with (
        rank_of(command),
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(host, "_cuda_is_available", lambda: True),
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(utils, "_te_version", Version("2.20.2")),
        _kernels(),
    ):
        assert torch.cuda.get_device_capability() == (9, 0)
        yield


@contextlib.contextmanager
def read(
    command: Command, *more: str, machine: contextlib.AbstractContextManager | None = None
) -> Iterator[tuple[Namespace, Any, Any]]:
    """Megatron's arguments, the dynamic layers' configuration and the run's, as training makes them.

    Args:
        more: flags after those of the command.
        machine: where it is read; default: :func:`hopper`.

    The parser is made once, and not again by Megatron; what Megatron keeps of a program is let go of.

    Raises:
        UserError: a refusal.
    """
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training import arguments
    from megatron.training.global_vars import destroy_global_vars

    from megatron_dynmoe.training import command_line
    from megatron_dynmoe.training.pretrain import pretrain_config

    def parse(*_: Any) -> Namespace:
        args = command_line._parser(()).parse_args(sys.argv[1:])
        args._is_global_batch_size_explicitly_specified = args.global_batch_size is not None
        args.rank, args.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return args

    with machine or hopper(command), mock.patch.object(arguments, "parse_args", parse):
        try:
            args, dynmoe, _ = command_line.read_flags([*command.words, *_TOKENIZER, *more])
            yield args, dynmoe, pretrain_config(args, dynmoe)
        finally:
            destroy_global_vars()
            destroy_num_microbatches_calculator()
