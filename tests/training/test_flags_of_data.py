"""Megatron's flags about data and loss: each acts as in Megatron's own entry, or is refused by name in a sentence."""

import contextlib
import hashlib
import io
import json
import math
import multiprocessing
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests import ranks
from tests.layouts import MODEL, flags, read_scalars

# The words after MODEL -> what the sentence must say beside the flag, which is the first word.
REFUSED = {
    "--moe-routing-trace-path trace": "--moe-metrics-file",
    "--sft": "--transformer-impl transformer_engine",
    "--dataloader-inter-document-masking": "--transformer-impl transformer_engine",
    "--hybrid-context-parallel": "--transformer-impl transformer_engine",
    "--iterations-to-skip 1 --pipeline-model-parallel-size 4": "at most two stages",
    "--context-parallel-size 2": "--transformer-impl transformer_engine",
    "--logits-load-dir logits": "--bf16",
    "--logits-load-dir logits --bf16 --pipeline-model-parallel-size 2": "one stage",
    "--logits-save-dir logits --pipeline-model-parallel-size 2": "one stage",
    "--reset-attention-mask --no-create-attention-mask-in-dataloader": "--dataloader-inter-document-masking",
    "--reset-attention-mask --window-size 8,0": "without a window",
    "--reset-position-ids": "--reset-attention-mask",
    "--multiple-validation-sets": "--full-validation",
    "--full-validation": "--multiple-validation-sets",
    "--full-validation --multiple-validation-sets": "--eval-micro-batch-size 1",
    "--pipeline-model-parallel-layout Et|t|t|t|m|L --pipeline-model-parallel-size 2 --mtp-num-layers 1": "zeros",
}
DOCUMENTS = [[5, 6, 7, 1] * 3, [8, 9, 1] * 9, [4] * 20 + [1]] * 8  # each ends with 1


def indexed(prefix: Path, documents: list[list[int]]) -> str:
    """A dataset through megatron's builder."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def without(*names: str) -> list[str]:
    """MODEL without flags, and their values where they have one."""
    kept, skip = [], False
    for word in MODEL:
        skip = word in names if word.startswith("--") else skip
        kept += [] if skip else [word]
    return kept


def ask_all(cases: list[str], result: Path) -> None:
    """In a rank: what the entry says to each case."""
    said = {}
    for case in cases:
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr):
            code = ranks.pretrain(flags("serial", *case.split()))
        said[case] = (code, stderr.getvalue())
    result.write_text(json.dumps(said))


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    ranks.call(ask_all, list(REFUSED), folder / "said.json", ranks=1, folder=folder)
    return json.loads((folder / "said.json").read_text())


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(said, case):
    code, text = said[case]
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1, text
    assert lines[0].startswith(f"error: {case.split()[0]} is ") and REFUSED[case] in lines[0]


def tokenizer_file(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<|endoftext|>"]
    words = ["<unk>", "<|endoftext|>", "a", "b", *special[:4]] + [f"w{n}" for n in range(24)]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": special})
    fast.save_pretrained(folder)


class Asked:
    """Stands for the model: keeps what it is called with."""

    training, vp_stage = True, None

    def __init__(self, config):
        self.config = config

    def __call__(self, *inputs, **targets):
        self.inputs, self.targets = inputs, targets

    def build_schedule_plan(self, *inputs, **targets):
        self(*inputs, **targets)
        return "plan"


def prepare(words: list[str], folder: Path):
    """Parsed flags over the documents, known to megatron as in training."""
    import sys

    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training import global_vars
    from megatron.training.arguments import parse_and_validate_args

    from megatron_dynmoe import host
    from megatron_dynmoe.training.arguments import add_dynmoe_args, prepare_argv

    def forget():
        global_vars.destroy_global_vars()
        destroy_num_microbatches_calculator()

    forget()
    data = ["--train-data-path", str(folder / "text"), "--data-cache-path", str(folder / "cache"), "--eod-mask-loss"]
    sys.argv[1:] = [*host.default_flags(), *prepare_argv([*without("--mock-data", "--split"), *data, *words])]
    args = parse_and_validate_args(add_dynmoe_args)
    forget()
    global_vars.set_global_variables(args)
    return args


def step_with(words: list[str], folder: Path):
    """The datasets that ``words`` make, what the model is given of the first batch, and the arguments."""
    import torch
    from megatron.training.argument_utils import gpt_config_from_args
    from torch.utils.data import DataLoader

    from megatron_dynmoe.training.datasets import build_datasets, data_prefixes
    from megatron_dynmoe.training.step import LossSums, forward_step

    args = prepare(words, folder)
    config = gpt_config_from_args(args).transformer
    train = build_datasets([8, 0, 0], config=config)[0]
    model = Asked(config)
    torch.manual_seed(0)
    batches = iter(DataLoader(train, batch_size=2))
    # As the schedule of --overlap-moe-expert-parallel-comm calls it.
    assert forward_step(batches, model, return_schedule_plan=True, evaluation=LossSums())[0] == "plan"
    forward_step(iter(DataLoader(train, batch_size=2)), model, evaluation=LossSums())
    assert data_prefixes(args) == [str(folder / "text")]
    return train, model, args


def honour_all(folder: Path) -> None:
    """In a rank: the flags that act before the model does."""
    import torch
    from megatron.core import parallel_state

    from megatron_dynmoe.config import ConfigError
    from megatron_dynmoe.training.datasets import _check_full_validation

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    indexed(folder / "text", DOCUMENTS)
    tokenizer_file(folder / "tokenizer")
    (folder / "counts.json").write_text(json.dumps({str(folder / "text"): [24, 25]}))
    (folder / "other.json").write_text(json.dumps({"elsewhere": [24, 25]}))

    eod_mask_reaches_the_model(folder)
    documents_are_packed(folder)
    middles_are_filled_in(folder)
    documents_do_not_see_each_other(folder)
    for datasets, test, says in (([[]], None, "set 0 has 0 sequences for 1 data-parallel"), ([[1]], [1], "test share")):
        with pytest.raises(ConfigError, match=says):
            _check_full_validation(datasets, test=test)
    train, _, _ = step_with(["--per-dataset-sequences-path", str(folder / "counts.json")], folder)
    assert train.config.sequences_per_dataset == {str(folder / "text"): [24, 25]}
    for words, says in (
        (["--per-dataset-sequences-path", str(folder / "other.json")], "of " + str(folder / "text")),
        (["--per-dataset-sequences-path", str(folder / "none.json")], "cannot be read"),
        (["--fim-data"], "--tokenizer-type is 'NullTokenizer'"),
        ([*tokenizer_flags(folder), "--fim-data", "--fim-pad-token", "<gone>"], "--fim-pad-token is '<gone>'"),
    ):
        with pytest.raises(ConfigError, match=says):
            step_with(words, folder)


def tokenizer_flags(folder: Path) -> list[str]:
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder / "tokenizer")]


def eod_mask_reaches_the_model(folder: Path) -> None:
    """The loss of multi-token prediction is computed in the model, so the mask must get there."""
    _, model, _ = step_with(["--mtp-num-layers", "1", *tokenizer_flags(folder)], folder)
    tokens, mask = model.inputs[0], model.targets["loss_mask"]
    assert ((mask == 0) == (tokens == 1)).all() and (tokens == 1).any()
    assert model.targets["packed_seq_params"] is None


def documents_are_packed(folder: Path) -> None:
    """Sequences of a micro-batch side by side, ends of documents told to attention; it counts positions anew."""
    _, model, args = step_with(["--dataloader-inter-document-masking", *tokenizer_flags(folder)], folder)
    tokens, positions, mask = model.inputs
    packed, length = model.targets["packed_seq_params"], args.micro_batch_size * args.seq_length
    ends = packed.cu_seqlens_q.tolist()
    assert tokens.shape == positions.shape == (1, length) and mask is None and packed.qkv_format == "thd"
    assert ends[0] == 0 and ends[-1] == length and args.seq_length in ends
    assert packed.max_seqlen_q == max(np.diff(ends))
    for end in ends[1:-1]:
        assert tokens[0, end - 1] == 1 or end % args.seq_length == 0
        assert positions[0, end] == 0


def documents_do_not_see_each_other(folder: Path) -> None:
    """The mask is True where attention must not look; positions start again."""
    _, model, _ = step_with(["--reset-attention-mask", "--reset-position-ids", *tokenizer_flags(folder)], folder)
    tokens, positions, mask = model.inputs
    end = (tokens[0] == 1).nonzero()[0].item()
    assert mask[0, 0, end + 1, : end + 1].all() and positions[0, end + 1] == 0


def middles_are_filled_in(folder: Path) -> None:
    """Every document turned round its middle, with its tokens; none of them is in the data."""
    words = ["--fim-data", "--fim-rate", "1.0", "--fim-spm-rate", "0.5", *tokenizer_flags(folder)]
    _, model, _ = step_with(words, folder)
    assert {4, 5, 6} <= set(model.inputs[0].flatten().tolist())


def test_flags_that_act_on_batches(tmp_path):
    ranks.call(honour_all, tmp_path, ranks=1, folder=tmp_path)


def test_whole_validation_sets_each_under_its_name(tmp_path):
    train, first, second = (
        indexed(tmp_path / name, [[2, 3, 4, 5] * 8 * count + [1]]) for name, count in (("t", 9), ("a", 5), ("b", 3))
    )
    words = f"""
        --train-data-path {train} --valid-data-path {first} {second} --data-cache-path {tmp_path / "cache"}
        --full-validation --multiple-validation-sets --validation-set-names a b --eval-micro-batch-size 1
        --eval-global-batch-size 1 --tensor-model-parallel-size 2 --sequence-parallel --train-iters 1
        --moe-metrics-file {tmp_path / "metrics.jsonl"}
    """
    ranks.call(ranks.pretrain, [*without("--mock-data", "--split"), *words.split()], ranks=2, folder=tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [(r["validation_set"], r["validation_tokens"]) for r in records if "validation_loss" in r]
    assert found == [("a", 5 * 32), ("b", 3 * 32)]


def write_teacher(folder: Path, iterations: int) -> None:
    """Logits as Megatron's saver writes them: that all probability is on token 3 and on token 4."""
    import torch

    zstandard = pytest.importorskip("zstandard")
    about = {"seed": 1234, "sequence_length": 32, "train_samples": 800, "blend": {"kind": "mock", "mock": True}}
    meta = {"hash": hashlib.md5(json.dumps(about, separators=(",", ":")).encode()).hexdigest()}
    values = torch.full((32, 2, 2), 0.5).log().half()
    tokens = torch.tensor([3, 4], dtype=torch.uint16).expand(32, 2, 2).contiguous()
    payload = io.BytesIO()
    torch.save(
        {"values": [values] * 4, "indices_low": [tokens] * 4, "bit_17": [torch.zeros(32, 2, 2, dtype=torch.bool)] * 4},
        payload,
    )
    files = {"_meta.json": json.dumps(meta).encode()}
    packed = zstandard.ZstdCompressor().compress(payload.getvalue())
    files |= {f"{iteration}.pt.zst": packed for iteration in range(iterations + 1)}
    folder.mkdir()
    with tarfile.open(folder / f"cp0_dp0__{iterations}.tar", "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def pretrain_as_under_torchrun(argv: list[str]) -> int:
    """In a rank: a process that a fork server made would start Megatron's reader of logits in the same way."""
    multiprocessing.set_start_method("fork", force=True)
    return ranks.pretrain(argv)


def test_a_teachers_logits_are_part_of_the_loss(tmp_path):
    write_teacher(tmp_path / "teacher", 2)
    words = f"""
        --bf16 --logits-load-dir {tmp_path / "teacher"} --logits-load-kd-loss-alpha 0.25 --exit-interval 2
        --tensorboard-dir {tmp_path / "tb"}
    """
    ranks.call(pretrain_as_under_torchrun, flags("serial", *words.split()), ranks=1, folder=tmp_path)
    lm, kd, total = (read_scalars(tmp_path / "tb", f"{name} loss") for name in ("lm", "logits distillation", "total"))
    for iteration in (1, 2):
        assert kd[iteration] > math.log(2)
        # Sums over four micro-batches of 64 tokens, in float32.
        assert math.isclose(total[iteration], 0.75 * lm[iteration] + 0.25 * kd[iteration], rel_tol=2**-24 * 16)


def test_a_spiky_loss_is_told_to_megatron(monkeypatch):
    import torch

    from megatron_dynmoe.training import step

    told = []

    class Machine:
        is_unexpectedly_large = staticmethod(lambda result, threshold, context: (threshold, context))

        def validate_result(self, *, rejection_func, message, **rest):
            told.append((message, rejection_func(rest["result"]), rest["fatal"]))

    args = type("Args", (), {"check_for_nan_in_loss_and_grad": False, "check_for_spiky_loss": True})
    monkeypatch.setattr(step, "get_args", lambda: args)
    monkeypatch.setattr(step, "get_rerun_state_machine", Machine)
    args.logits_load_dir = None
    loss, tokens, _ = step.loss_func(torch.ones(1, 2), torch.ones(1, 2), model=None)
    assert (loss, tokens) == (2, 2)
    assert told == [("Spiky loss", (10, "loss"), False)]
