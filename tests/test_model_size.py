"""The paper's model, built on the meta device from the example's flags, has the paper's parameter counts.

Nothing is allocated: Megatron parses and checks the flags as for training and builds its GPT model from them, but the
parameters have shapes and no storage.
"""

import json
import shlex
from pathlib import Path

import pytest

from tests import ranks

ARGS_FILE = Path(__file__).resolve().parent.parent / "examples" / "models" / "dynamic_moe_24l.args"
# What Megatron's parser wants beside the model; none of it changes a shape. The vocabulary is padded from 31999 to
# LLaMA-2's 32000.
REST = "--micro-batch-size 1 --train-iters 1 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 31999"

# The dense model of the same width: no experts, so no router either.
EXPERT_FLAGS = {"--num-experts", "--moe-ffn-hidden-size", "--moe-layer-freq", "--moe-preset"}
# What else a model shape may have: name -> (flags taken away, flags added).
VARIANTS = {
    "dense": (EXPERT_FLAGS, ""),
    "every other layer": (set(), "--moe-layer-freq 2"),
    "a pattern of layers": (set(), "--moe-layer-freq [0]*1+[1]*23"),
    "shared expert": (set(), "--moe-shared-expert-intermediate-size 704"),
    "grouped queries": (set(), "--group-query-attention --num-query-groups 4"),
    "other dense width": (set(), "--moe-layer-freq 2 --ffn-hidden-size 4096"),
    "wide heads": (set(), "--kv-channels 128"),
    "padded vocabulary": (set(), "--vocab-size 32100"),
    "tied": ({"--untie-embeddings-and-output-weights"}, ""),
    "not gated": ({"--swiglu"}, ""),
    "top-any": (set(), "--moe-preset dynmoe --moe-gate cosine --moe-train-cosine-scale"),
    "residual": (set(), "--moe-shared-expert-intermediate-size 704 --moe-residual"),
    "several at once": (
        set(),
        "--moe-layer-freq 2 --moe-shared-expert-intermediate-size 704 --group-query-attention --num-query-groups 4",
    ),
}


def model_flags() -> list[str]:
    """The flags of the example's model file, which has comments as in a shell."""
    return shlex.split(ARGS_FILE.read_text(encoding="utf-8"), comments=True)


def without(flags: list[str], names: set[str]) -> list[str]:
    """``flags`` without those in ``names`` and their values."""
    kept, leave_out = [], False
    for word in flags:
        if word.startswith("--"):
            leave_out = word in names
        if not leave_out:
            kept.append(word)
    return kept


def count_all(models: dict[str, list[str]], result: str) -> None:
    """In a rank: count the parameters of each model and write them to ``result``."""
    import torch
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    counts = {name: count(flags) for name, flags in models.items()}
    Path(result).write_text(json.dumps(counts), encoding="utf-8")


def count(flags: list[str]) -> dict[str, int]:
    """Parameters of the model that training would build from ``flags``, and what ModelShape says of it."""
    import sys
    from functools import partial

    import torch
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.global_vars import destroy_global_vars
    from megatron.training.models.gpt import GPTModelBuilder

    from megatron_dynmoe import host
    from megatron_dynmoe.training.arguments import add_dynmoe_args, dynmoe_from_args, prepare_argv
    from megatron_dynmoe.training.log import model_shape
    from megatron_dynmoe.training.pretrain import layer_spec

    sys.argv[1:] = [*host.default_flags(), *prepare_argv(flags)]
    args = parse_and_validate_args(add_dynmoe_args)
    destroy_global_vars()
    destroy_num_microbatches_calculator()

    config = gpt_config_from_args(args)
    if args.num_experts:
        config.transformer_layer_spec = partial(layer_spec, dynmoe=dynmoe_from_args(args))
    # Then parameters are made on the default device, which is meta, and nobody tries to fill them.
    config.transformer.use_cpu_initialization, config.transformer.perform_initialization = True, False
    with torch.device("meta"):
        model = GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    assert all(parameter.is_meta for parameter in model.parameters())

    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    shape = model_shape(args)
    return {
        "total": sum(sizes.values()),
        "in experts": sum(size for name, size in sizes.items() if ".mlp.experts." in name),
        "shape total": shape.total,
        "shape without experts": shape.without_experts,
        "shape with two experts": int(shape.activated(2)),
    }


@pytest.fixture(scope="module")
def counts(tmp_path_factory) -> dict[str, dict[str, int]]:
    """Counts by variant; one rank builds all of them."""
    folder = tmp_path_factory.mktemp("model_size")
    paper = [*model_flags(), *REST.split()]
    models = {name: without(paper, gone) + extra.split() for name, (gone, extra) in VARIANTS.items()}
    result = folder / "counts.json"
    ranks.call(count_all, {"paper": paper} | models, str(result), ranks=1, folder=folder)
    return json.loads(result.read_text(encoding="utf-8"))


@pytest.mark.parametrize("variant", ["paper", *VARIANTS])
def test_model_shape_counts_what_the_model_has(counts, variant):
    got = counts[variant]
    assert got["shape total"] == got["total"]
    assert got["shape without experts"] == got["total"] - got["in experts"]
    assert (got["in experts"] > 0) == (variant != "dense")


def test_the_papers_counts(counts):
    paper, dense = counts["paper"], counts["dense"]["total"]
    per_expert = paper["in experts"] // 16
    top_1, top_2 = (paper["total"] - paper["in experts"] + k * per_expert for k in (1, 2))
    routers = 24 * 16 * 1024
    assert round(dense / 1e6) == 374
    assert round(paper["total"] / 1e9, 1) == 3.5
    assert round(top_1 / 1e6) == 374
    assert paper["shape with two experts"] == top_2 == 581_878_784
    # The paper prints 581M: that is the count without the routers (581.49M), which add 0.39M.
    assert round((top_2 - routers) / 1e6) == 581
