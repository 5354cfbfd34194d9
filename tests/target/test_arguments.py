"""Which command lines of pretrain.sh a cluster of Hopper GPUs accepts; the others are refused in one sentence.

The flags are the script's own, for each model file.  Checked is the whole way that training goes before it starts
anything: our checks, Megatron's, the configurations of model and run.  What is accepted without Transformer Engine is
then built, in small, on the meta device.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests import ranks
from tests.target.arguments import read
from tests.target.commands import MODELS, Command, written
from tests.target.device import META, cuda_is

WORLDS = (8, 16, 64, 256)
KINDS = ("dynamic_moe_24l", "dynmoe_24l", "moe_plus_plus_7b")
LAYOUTS = {
    "TP 2": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    "PP 2": ("--pipeline-model-parallel-size", "2"),
    "CP 2": ("--context-parallel-size", "2"),
}
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
SMALL = """
    --num-layers 4 --hidden-size 64 --ffn-hidden-size 96 --moe-ffn-hidden-size 48 --num-attention-heads 4
    --seq-length 64 --max-position-embeddings 64
""".split()


def fp8(command: Command) -> list[Command]:
    """The command with each format and recipe of FP8, with and without parameters that are gathered in FP8."""
    flags = [
        ("--fp8-format", number, "--fp8-recipe", recipe, *gather)
        for number in ("hybrid", "e4m3")
        for recipe in RECIPES
        for gather in ((), ("--fp8-param-gather",))
    ]
    # They stand last, and the script looks at none of them.
    return [replace(command, flags=command.flags + some, words=command.words + some) for some in flags]


def commands(folder: Path) -> list[Command]:
    """All of them, with their words."""
    implementations = ("transformer_engine", "local")
    asked = [Command(model, world, impl) for model in MODELS for world in WORLDS for impl in implementations]
    asked += [
        Command(model, world, impl, flags)
        for model in KINDS
        for flags in LAYOUTS.values()
        for world in (8, 256)
        for impl in implementations
    ]
    found = written(asked, folder)
    te = [command for command in found if command.impl == "transformer_engine"]
    found += [replace(command, apex=True) for command in te if not command.flags]
    for command in te:
        if command.world == 256 and command.model in (KINDS if not command.flags else KINDS[-1:]):
            found += fp8(command)
    return found


def refusal(command: Command) -> str | None:
    """How the sentence begins with which a command is to be refused; ``None``: it is to be accepted."""
    if "mxfp8" in command.flags:
        return "--fp8-recipe is 'mxfp8'"
    if command.impl == "local" and "--context-parallel-size" in command.flags:
        return "--context-parallel-size is 2"
    return None


def check_command(command: Command) -> None:
    from megatron_dynmoe.training.failures import describe

    wanted = refusal(command)
    try:
        with read(command) as (args, dynmoe, config):
            assert wanted is None, f"accepted, and not refused with {wanted!r}"
            check_accepted(command, args, dynmoe, config)
    except AssertionError:
        raise
    except Exception as error:
        sentence, code, kept = describe(error)
        assert wanted is not None, f"refused: {sentence}"
        assert sentence.startswith(wanted) and sentence.endswith("."), sentence
        assert (sentence.count("\n"), code, kept) == (0, 2, None)


def check_accepted(command: Command, args: Namespace, dynmoe: Any, config: Any) -> None:
    transformer, model = config.model.transformer, config.model
    replicas = command.world // (2 if command.flags[:1] and command.flags[0] != "--fp8-format" else 1)
    # Tensor-parallel ranks share the experts' ranks among them, and stages have experts of their own.
    apart = any(flag in command.flags for flag in (LAYOUTS["TP 2"][0], LAYOUTS["PP 2"][0]))
    assert args.data_parallel_size == replicas
    assert args.expert_model_parallel_size == min(8, command.world // (2 if apart else 1))
    most = 2 if command.model == "dynamic_moe_30b_a3b" else 8
    assert args.micro_batch_size == min(most, 512 // replicas) and args.global_batch_size == 512
    assert args.bf16 and args.use_distributed_optimizer
    assert transformer.moe_permute_fusion == (command.impl == "transformer_engine")
    assert (args.moe_router_topk, model.dynmoe) == (dynmoe.topk, dynmoe)
    assert (transformer.fp8 is not None) == ("--fp8-format" in command.flags)
    assert bool(transformer.fp8_param) == ("--fp8-param-gather" in command.flags)
    if command.impl == "transformer_engine":  # the kernel is apex', or the host puts another in its place
        stands_in = importlib.util.find_spec("megatron_dynmoe.host.accumulation") is not None
        assert transformer.gradient_accumulation_fusion == (command.apex or stands_in)


def check_all(every: list[Command]) -> None:
    failed = []
    for command in every:
        said = io.StringIO()  # Megatron prints each of its 800 arguments
        try:
            with contextlib.redirect_stdout(said):
                check_command(command)
        except AssertionError as error:
            failed.append(f"{command}: {error}")
    assert not failed, "\n".join(failed)


def test_command_lines(tmp_path):
    every = commands(tmp_path)
    assert len(every) > 200 and {refusal(command) is None for command in every} == {True, False}
    ranks.call(check_all, every, ranks=1, folder=tmp_path)


def check_built(every: list[Command]) -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=16)
    for command in every:
        with contextlib.redirect_stdout(io.StringIO()), read(command, *SMALL) as (args, _, config):
            parallel_state.initialize_model_parallel(
                args.tensor_model_parallel_size,
                args.pipeline_model_parallel_size,
                context_parallel_size=args.context_parallel_size,
                expert_model_parallel_size=args.expert_model_parallel_size,
                expert_tensor_parallel_size=args.expert_tensor_parallel_size,
                create_gloo_process_groups=False,
            )
            model_parallel_cuda_manual_seed(1)
            with cuda_is(META):
                builder = config.model.get_builder_cls()(config.model)
                model = builder.build_model(ProcessGroupCollection.use_mpu_process_groups()).cuda()
            check_model(command, model, args)
            parallel_state.destroy_model_parallel()


def check_model(command: Command, model: Any, args: Namespace) -> None:
    from megatron_dynmoe.mcore.layer import DynMoELayer

    layers = [layer for layer in model.modules() if isinstance(layer, DynMoELayer)]
    assert len(layers) == 4 // args.pipeline_model_parallel_size, str(command)
    for layer in layers:
        assert layer.num_local_experts == args.num_experts // 8
        assert type(layer.experts).__name__ == ("TEGroupedMLP" if command.impl != "local" else "TorchGroupedMLP")
    assert all(parameter.device == META for parameter in model.parameters())


def test_what_is_accepted_is_built(tmp_path):
    asked = [Command(model, 16, "local") for model in MODELS]
    asked += [Command(model, 16, "local", LAYOUTS[name]) for model in KINDS for name in ("TP 2", "PP 2")]
    assert not any(map(refusal, asked))
    ranks.call(check_built, written(asked, tmp_path), ranks=1, folder=tmp_path)
