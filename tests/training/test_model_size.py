"""The papers' models, built on the meta device from the examples' flags, have the papers' parameter counts.

Nothing is allocated: Megatron parses and checks the flags as for training and builds its GPT model from them, but the
parameters have shapes and no storage.
"""

import json
import shlex
from pathlib import Path

import pytest

from tests import ranks

MODELS = Path(__file__).resolve().parents[2] / "examples" / "models"
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
    "norms of queries and keys": (set(), "--qk-layernorm"),
    "padded vocabulary": (set(), "--vocab-size 32100"),
    "tied": ({"--untie-embeddings-and-output-weights"}, ""),
    "not gated": ({"--swiglu"}, ""),
    "top-any": (set(), "--moe-preset dynmoe --moe-gate cosine --moe-train-cosine-scale"),
    "residual": (set(), "--moe-shared-expert-intermediate-size 704 --moe-residual"),
    "two layers predict later tokens": (set(), "--mtp-num-layers 2"),
    "they are dense": (set(), "--moe-layer-freq [1]*23+[0] --mtp-num-layers 1"),
    "one layer does it twice": (set(), "--mtp-num-layers 2 --mtp-use-repeated-layer"),
    "several at once": (
        set(),
        "--moe-layer-freq 2 --moe-shared-expert-intermediate-size 704 --group-query-attention --num-query-groups 4",
    ),
}


# MoE++, whose tokenizer has 65536 entries: name -> flags added to those of the example's file.
PLUS_PLUS = {
    "moe_plus_plus_0.6b": "",
    "moe_plus_plus_1b": "",
    "moe_plus_plus_2b": "",
    "moe_plus_plus_7b": "",
    "moe_plus_plus_0.6b as released": "--moe-preset moe-plus-plus-released",
    "moe_plus_plus_0.6b, every other layer": "--moe-layer-freq 2",
    "moe_plus_plus_0.6b, copy experts alone": "--moe-constant-experts 0 --moe-zero-experts 0 --moe-copy-experts 3",
}


def model_flags(model: str) -> list[str]:
    """The flags of the example's model file, which has comments as in a shell."""
    return shlex.split((MODELS / f"{model}.args").read_text(encoding="utf-8"), comments=True)


def plus_plus_flags(name: str) -> list[str]:
    """Those of an entry of PLUS_PLUS."""
    model = name.partition(" ")[0].rstrip(",")
    return [*model_flags(model), *REST.split(), "--vocab-size", "65535", *PLUS_PLUS[name].split()]


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

    from megatron_dynmoe import host
    from megatron_dynmoe.training.arguments import add_dynmoe_args, dynmoe_from_args, prepare_argv
    from megatron_dynmoe.training.log import model_shape
    from megatron_dynmoe.training.model import DynamicGPTModelBuilder, DynamicGPTModelConfig, layer_spec

    sys.argv[1:] = [*host.default_flags(), *prepare_argv(flags)]
    args = parse_and_validate_args(add_dynmoe_args)
    destroy_global_vars()
    destroy_num_microbatches_calculator()

    config = gpt_config_from_args(args, model_config_cls=DynamicGPTModelConfig)
    if args.num_experts:
        config.dynmoe = dynmoe_from_args(args)
        config.transformer_layer_spec = partial(layer_spec, dynmoe=config.dynmoe)
    # Then parameters are made on the default device, which is meta, and nobody tries to fill them.
    config.transformer.use_cpu_initialization, config.transformer.perform_initialization = True, False
    with torch.device("meta"):
        model = DynamicGPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
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
    paper = [*model_flags("dynamic_moe_24l"), *REST.split()]
    models = {name: without(paper, gone) + extra.split() for name, (gone, extra) in VARIANTS.items()}
    models["30b"] = [*model_flags("dynamic_moe_30b_a3b"), *REST.split(), "--vocab-size", "151935"]
    models |= {name: plus_plus_flags(name) for name in PLUS_PLUS}
    result = folder / "counts.json"
    ranks.call(count_all, {"paper": paper} | models, str(result), ranks=1, folder=folder)
    return json.loads(result.read_text(encoding="utf-8"))


@pytest.mark.parametrize("variant", ["paper", "30b", *VARIANTS, *PLUS_PLUS])
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


def test_the_counts_of_the_model_as_large_as_qwen3_30b_a3b(counts):
    got = counts["30b"]
    per_expert, layers = 3 * 2048 * 768, 48
    assert got["in experts"] == layers * 128 * per_expert
    # Qwen3's report: 30.5B in total and 3.3B activated, of which the routers, embedding and output layer are part
    activated = got["total"] - got["in experts"] + layers * 8 * per_expert
    assert (round(got["total"] / 1e9, 1), round(activated / 1e9, 1)) == (30.5, 3.4)
    text = (MODELS / "dynamic_moe_30b_a3b.args").read_text(encoding="utf-8")
    for number, what in ((got["total"], "parameters"), (activated, "activated"), (got["shape without experts"], "w")):
        assert f" {number / 1e9:.2f}B {what}" in text


@pytest.mark.parametrize(
    ("size", "experts", "layers", "width", "expert_width", "billions", "activated"),
    [
        ("0.6b", 8, 12, 768, 2048, 0.6, 0.2),
        ("1b", 16, 12, 768, 2048, 1.0, 0.2),
        ("2b", 32, 12, 768, 2048, 1.9, 0.2),
        # The paper calls it 7B, 1.2B activated; the widths that it prints give 7.7B, and 1.3B or, without the input
        # embedding, 1.2B.
        ("7b", 16, 24, 1536, 4096, 7.7, 1.3),
    ],
)
def test_the_counts_of_moe_plus_plus(counts, size, experts, layers, width, expert_width, billions, activated):
    got = counts[f"moe_plus_plus_{size}"]
    assert got["in experts"] == layers * experts * 3 * width * expert_width
    assert round(got["total"] / 1e9, 1) == billions
    assert round(got["shape with two experts"] / 1e9, 1) == activated
    text = (MODELS / f"moe_plus_plus_{size}.args").read_text(encoding="utf-8")
    for number, what in ((got["total"], "parameters"), (got["shape with two experts"], "activated")):
        said = f"{number / 1e6:.0f}M" if number < 1e9 else f"{number / 1e9:.2f}B"
        assert f" {said} {what}" in text
    embedding = 65536 * width
    if size == "7b":
        assert round((got["shape with two experts"] - embedding) / 1e9, 1) == 1.2
    # What MoE++ has beside a plain MoE of the same size: next to nothing, as the paper says.
    plain = layers * (experts * (3 * expert_width + 1) + 4 * width + 2) * width + width + 2 * embedding
    assert 0 < got["total"] - plain < 1e-3 * plain
