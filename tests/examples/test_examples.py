"""The example scripts: what they hand to torchrun and what they refuse. Slurm: test_slurm.py; sizes: test_smoke.py."""

import os
import shlex

import pytest

from tests import ranks
from tests.example_scripts import (  # noqa: F401  (a fixture)
    EXAMPLES,
    MODELS,
    TORCHRUN,
    contains,
    dry_run,
    model_flags,
    requeued,
    run,
    settings,
    slurm,
    stand_ins,
    torchrun_args,
)
from tests.layouts import read_metrics

# What the papers say of each model's routing: fields of DynMoEConfig.
ROUTING = {
    "dynamic_moe_24l": {
        "gate": "softmax",
        "rule": "top-p",
        "top_p": 0.4,
        "load_balance_coeff": 1e-2,
        "entropy_coeff": 1e-4,
        "adaptive_experts": False,
    },
    "dynamic_moe_30b_a3b": {"gate": "softmax", "rule": "top-p", "top_p": 0.4, "max_experts_per_token": 8},
    "dynmoe_24l": {
        "gate": "cosine",
        "rule": "top-any",
        "diversity_coeff": 1e-2,
        "simplicity_coeff": 1e-2,
        "load_balance_coeff": 0,
        "adaptive_experts": True,
        "initial_experts": 8,
        "record_from": 300,
        "update_at": 600,
        "update_period": 900,
    },
}
MOE_PLUS_PLUS = {
    "gate": "softmax",
    "rule": "top-k",
    "topk": 2,
    "zero_experts": 1,
    "copy_experts": 1,
    "constant_experts": 2,
    "gating_residual": True,
    "tau": 0.75,
    "load_balance_coeff": 1e-2,
    "capacity_gamma": None,
    "expert_input_scale": 1.0,
}
ROUTING |= {f"moe_plus_plus_{size}": MOE_PLUS_PLUS for size in ("0.6b", "1b", "7b")}
ROUTING["moe_plus_plus_2b"] = MOE_PLUS_PLUS | {"constant_experts": 6}
FFN_EXPERTS = dict.fromkeys(ROUTING, 16) | {"moe_plus_plus_0.6b": 8, "moe_plus_plus_2b": 32}
FFN_EXPERTS["dynamic_moe_30b_a3b"] = 128
MICRO_BATCH = dict.fromkeys(ROUTING, 8) | {"dynamic_moe_30b_a3b": 2}  # sequences a GPU at most

# The schedule of MoE++ (its table B), for which the model files say what to add.
SCHEDULE = {
    "global_batch_size": 2048,
    "train_iters": 23842,
    "lr": 5e-4,
    "min_lr": 5e-5,
    "lr_warmup_iters": 2000,
    "lr_warmup_init": 1e-7,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "seq_length": 2048,
}


def parse_for_eight_gpus(argv: list[str], routing: dict, experts: int, schedule: dict) -> None:
    """In a rank: Megatron's parser and its checks, and the dynamic layer's, accept the command line on 8 ranks."""
    import sys

    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_args, validate_args

    from megatron_dynmoe.mcore.checks import check_config
    from megatron_dynmoe.training.arguments import add_dynmoe_args, dynmoe_from_args, prepare_argv

    os.environ["WORLD_SIZE"] = "8"
    sys.argv[1:] = prepare_argv(argv)
    args = parse_args(add_dynmoe_args)
    dynmoe = dynmoe_from_args(args)
    validate_args(args)
    if args.transformer_impl == "local":  # Megatron makes the other's configuration only where Transformer Engine is
        args.padded_vocab_size = 32000  # training takes it from the tokenizer, which is an empty file here
        check_config(gpt_config_from_args(args).transformer, dynmoe)
    assert {name: getattr(dynmoe, name) for name in routing} == routing
    assert (args.data_parallel_size, args.expert_model_parallel_size, args.num_experts) == (8, 8, experts)
    assert {name: getattr(args, name) for name in schedule} == schedule
    assert args.bf16 and args.use_distributed_optimizer and args.dist_ckpt_optim_fully_reshardable
    step = args.global_batch_size * args.seq_length
    assert 0 <= args.train_iters * step - 100e9 < step  # 100B tokens, in whole steps


@pytest.mark.parametrize("model", MODELS)
def test_torchrun_gets_the_models_flags(stub, model):
    done = run("pretrain.sh", stub, model, "--micro-batch-size", "4", **settings(stub))
    assert done.returncode == 0, done.stderr
    own, flags = torchrun_args(stub)
    expected = model_flags(model)
    assert contains(flags, expected)
    assert own == ["--standalone", "--nproc-per-node", "8"]
    assert flags[-2:] == ["--micro-batch-size", "4"]  # the user's own stand last, and win
    assert model not in flags
    assert contains(flags, ["--data-path", "0.7", f"{stub}/text", "0.3", f"{stub}/text"])
    assert contains(flags, ["--tokenizer-type", "SentencePieceTokenizer"])
    for flag in ("--moe-grouped-gemm", "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"):
        assert flag in flags


def test_the_two_models_differ_in_routing_only():
    routing = ("moe-preset", "moe-initial-experts", "moe-max-rows-per-token")
    architectures = []
    for model in ("dynamic_moe_24l", "dynmoe_24l"):
        flags = " ".join(model_flags(model)).split(" --")
        architectures.append({one for one in flags if not one.startswith(routing)})
    assert architectures[0] == architectures[1]


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
@pytest.mark.parametrize("model", MODELS)
def test_megatron_accepts_the_models_flags(stub, model, impl):
    done = run("pretrain.sh", stub, model, TRANSFORMER_IMPL=impl, **settings(stub))
    assert done.returncode == 0, done.stderr
    given = torchrun_args(stub)[1], ROUTING[model], FFN_EXPERTS[model], {}
    ranks.call(parse_for_eight_gpus, *given, ranks=1, folder=stub / "parse")


def parse_for_many_gpus(commands: list[tuple[int, str, list[str]]]) -> None:
    """In a rank: Megatron's parser and its checks accept each command line on so many ranks."""
    import sys

    from megatron.training.arguments import parse_args, validate_args

    from megatron_dynmoe.training.arguments import add_dynmoe_args, prepare_argv

    for gpus, model, argv in commands:
        print(gpus, model, flush=True)
        os.environ["WORLD_SIZE"] = str(gpus)
        sys.argv[1:] = prepare_argv(argv)
        args = parse_args(add_dynmoe_args)
        validate_args(args)
        assert args.global_batch_size == 512
        assert args.micro_batch_size == min(MICRO_BATCH[model], 512 // args.data_parallel_size), (gpus, model)


def test_the_micro_batch_fits_the_number_of_gpus(stub):
    commands = []
    for nodes, layout in ((1, []), (2, []), (8, []), (32, []), (64, []), (32, ["--tensor-model-parallel-size", "2"])):
        for model in MODELS if nodes in (1, 32) else MODELS[:1]:
            sequence = ["--sequence-parallel"] if layout else []
            commands.append(
                (8 * nodes, model, dry_run("pretrain.sh", stub, model, *layout, *sequence, NNODES=str(nodes)))
            )
    ranks.call(parse_for_many_gpus, commands, ranks=1, folder=stub / "parse")


def test_gpus_that_cannot_share_a_step_are_refused(stub):
    done = run("pretrain.sh", stub, MODELS[0], NNODES="128", **settings(stub))
    assert done.returncode == 2 and "--global-batch-size is 512, which 1024 data-parallel replicas" in done.stderr
    more = dry_run("pretrain.sh", stub, MODELS[0], "--global-batch-size", "2048", NNODES="128")
    assert contains(more, ["--micro-batch-size", "2"])


@pytest.mark.parametrize("flag", ["--tensor-model-parallel-size", "--context-parallel-size"])
def test_tensor_and_context_parallelism_have_one_queue(stub, flag):
    asking = TORCHRUN.replace("exit", 'echo "queues ${CUDA_DEVICE_MAX_CONNECTIONS:-}"\nexit')
    (stub / "torchrun").write_text(asking)
    said = {n: run("pretrain.sh", stub, MODELS[0], flag, n, **settings(stub)).stdout.strip() for n in ("1", "2")}
    assert said == {"1": "queues", "2": "queues 1"}


def schedule_of(model: str) -> tuple[dict[str, str], list[str]]:
    """The command in a model file's comment: its environment, and the flags after the model's name."""
    lines = (EXAMPLES / "models" / f"{model}.args").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("#   TRAIN_ITERS="))
    words = shlex.split(" ".join(line.removeprefix("#").removesuffix("\\") for line in lines[start : start + 2]))
    (name, _, value), *rest = words[0].partition("="), *words[1:]
    assert rest[:2] == ["examples/pretrain.sh", model]
    return {name: value}, rest[2:]


def test_the_schedule_of_moe_plus_plus(stub):
    wanted = {model: schedule_of(model) for model in MODELS if model.startswith("moe_plus_plus")}
    assert len(wanted) == 4 and all(schedule == wanted["moe_plus_plus_7b"] for schedule in wanted.values())
    environment, flags = wanted["moe_plus_plus_7b"]
    given = settings(stub) | environment | {"TRANSFORMER_IMPL": "local"}
    done = run("pretrain.sh", stub, "moe_plus_plus_7b", *flags, **given)
    assert done.returncode == 0, done.stderr
    argv = torchrun_args(stub)[1]
    ranks.call(parse_for_eight_gpus, argv, MOE_PLUS_PLUS, 16, SCHEDULE, ranks=1, folder=stub / "parse")


@pytest.mark.parametrize("script", ["pretrain.sh", "slurm.sh"])
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "MODEL is missing"),
        (["--micro-batch-size", "4"], "MODEL is --micro-batch-size"),
        (["dynmoe"], "MODEL is dynmoe;"),
        (["dynmoe_24l.args"], "MODEL is dynmoe_24l.args;"),
    ],
)
def test_no_such_model_is_one_sentence(stub, script, flags, says):
    done = slurm(stub, flags=flags) if script == "slurm.sh" else run(script, stub, *flags, **settings(stub))
    assert done.returncode == 2
    assert done.stderr.startswith(f"pretrain.sh: {says}") and done.stderr.count("\n") == 1
    assert done.stderr.endswith(f": {', '.join(MODELS)}.\n")
    assert not (stub / "torchrun.args").exists() and not requeued(stub)


@pytest.mark.parametrize("name", ["DATA", "TOKENIZER", "SAVE"])
def test_missing_setting_is_one_sentence(stub, name):
    environment = settings(stub) | {name: ""}
    done = run("pretrain.sh", stub, "dynamic_moe_24l", **environment)
    assert done.returncode == 2
    assert done.stderr.startswith(f"pretrain.sh: {name} is not set") and done.stderr.count("\n") == 1
    assert not (stub / "torchrun.args").exists()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("DATA", "1.0 nowhere", "there is no nowhere.idx"),
        ("TOKENIZER", "nowhere.model", "TOKENIZER is nowhere.model, which does not exist"),
        ("TRANSFORMER_IMPL", "fast", "TRANSFORMER_IMPL is fast; accepted: transformer_engine or local"),
    ],
)
def test_wrong_setting_is_one_sentence(stub, name, value, says):
    done = run("pretrain.sh", stub, "dynamic_moe_24l", **(settings(stub) | {name: value}))
    assert done.returncode == 2
    assert says in done.stderr and done.stderr.count("\n") == 1


def test_laptop_trains(stub):
    assert run("laptop.sh", stub).returncode == 0
    own, flags = torchrun_args(stub)
    assert own == ["--standalone", "--nproc-per-node", "2"]
    metrics = stub / "metrics.jsonl"
    ranks.call(ranks.pretrain, [*flags, "--moe-metrics-file", str(metrics)], ranks=2, folder=stub / "laptop")
    records = read_metrics(metrics)
    assert [record["iteration"] for record in records] == [10, 20, 30, 40]
    # made-up text that counts upwards: a model that learns at all learns it fast
    assert records[-1]["lm_loss"] < records[0]["lm_loss"] / 2
    assert all(1 < record["experts_per_token"] < 4 for record in records)


def test_laptop_refuses_ranks_that_do_not_divide(stub):
    done = run("laptop.sh", stub, RANKS="3")
    assert done.returncode == 2 and "RANKS is 3; accepted: 1, 2 or 4" in done.stderr
