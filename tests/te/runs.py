"""Training runs of this leg: command lines of ``examples/pretrain.sh`` at toy sizes, and what ranks do with them."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from tests import ranks
from tests.layouts import read_scalars

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
MODELS = sorted(file.stem for file in (EXAMPLES / "models").glob("*.args"))
RANKS = 2
SCALARS = ("lm loss", "grad-norm", "load_balancing_loss", "experts_per_token")

# Appended, so that everything else is the script's. Widths are multiples of what FP8 asks for.
TOY = """
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 64 --moe-ffn-hidden-size 48 --num-attention-heads 4
    --seq-length 32 --max-position-embeddings 32 --init-method-std 0.1
    --micro-batch-size 2 --global-batch-size 8 --expert-model-parallel-size 2 --lr 1e-3 --lr-warmup-iters 0
    --eval-iters 0 --split 100,0,0 --num-workers 0 --log-interval 1 --save-interval 1000
""".split()


def make_data(folder: Path) -> dict[str, str]:
    """The script's settings: an indexed dataset of random words and a SentencePiece model for them."""
    import numpy as np
    import sentencepiece
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    random = np.random.default_rng(0)
    sentences = [" ".join("".join(random.choice(list("abcdefgh"), 3)) for _ in range(12)) for _ in range(200)]
    model = folder / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(model), vocab_size=120, minloglevel=2
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=f"{model}.model")
    builder = IndexedDatasetBuilder(f"{folder / 'text'}.bin", dtype=np.uint16)
    for sentence in sentences:
        tokens = [*processor.encode(sentence), processor.eos_id()]
        builder.add_document(torch.tensor(tokens), [len(tokens)])
    builder.finalize(f"{folder / 'text'}.idx")
    return {"DATA": f"1.0 {folder / 'text'}", "TOKENIZER": f"{model}.model"}


def command(model: str, settings: dict[str, str], save: Path, *flags: str) -> list[str]:
    """What ``pretrain.sh model`` gives the training entry, then the toy sizes (with SMOKE its own) and ``flags``.

    torchrun is stood in for by a program that writes its arguments down.
    """
    save.mkdir(parents=True, exist_ok=True)
    stub, written = save / "torchrun", save / "torchrun.args"
    stub.write_text(f"#!/bin/bash\nprintf '%s\\n' \"$@\" >{written}\n")
    stub.chmod(0o755)
    environment = (
        os.environ | settings | {"SAVE": str(save), "TORCHRUN": str(stub), "RESTARTS": "0", "GPUS": str(RANKS)}
    )
    environment = {"TRAIN_ITERS": "100"} | environment
    subprocess.run(["bash", str(EXAMPLES / "pretrain.sh"), model], env=environment, check=True, timeout=60)
    words = written.read_text().splitlines()
    argv = words[words.index(str(EXAMPLES / "pretrain_dynmoe.py")) + 1 :]
    return [*argv, *([] if "SMOKE" in settings else TOY), *flags]


def train(argv: list[str], folder: Path, *, with_apex: bool = False, kill_at: int = 0) -> dict[str, dict[int, float]]:
    """Run the entry on two ranks; loss, gradient norm and the like, by iteration.

    Args:
        with_apex: with a stand-in for apex' accumulation kernel instead of the one over Transformer Engine's GEMM.
        kill_at: end both ranks by SIGKILL when this iteration is logged.
    """
    argv = [*argv, "--tensorboard-dir", str(folder / "tb"), "--moe-metrics-file", str(folder / "metrics.jsonl")]
    run = ranks.start(in_rank, argv, with_apex, kill_at, ranks=RANKS, folder=folder)
    if kill_at:
        while all(process.is_alive() for process in run.processes):
            run.processes[0].join(0.05)
        run.kill(signal.SIGKILL)
    codes = run.wait()
    expected = [-signal.SIGKILL] * RANKS if kill_at else [0] * RANKS
    assert codes == expected, "\n".join(run.output(rank)[-4000:] for rank in range(RANKS))
    return {name: read_scalars(folder / "tb", name) for name in SCALARS}


def in_rank(argv: list[str], with_apex: bool, kill_at: int) -> int:
    if with_apex:
        put_apex_in_place()
    if kill_at:
        kill_when_logged(kill_at)
    return ranks.pretrain(argv)


def put_apex_in_place() -> None:
    """As if megatron had found apex' extension when it was imported."""
    import sys
    from types import ModuleType

    from megatron.core.tensor_parallel import layers

    from megatron_dynmoe import host
    from tests.te.preload import claim_hopper

    host.disable()
    apex = ModuleType("fused_weight_gradient_mlp_cuda")
    apex.wgrad_gemm_accum_fp32 = lambda x, grad, main: main.addmm_(grad.float().T, x.float())
    sys.modules[apex.__name__] = layers.fused_weight_gradient_mlp_cuda = apex
    layers._grad_accum_fusion_available = True
    host.enable()
    claim_hopper()
    assert layers.fused_weight_gradient_mlp_cuda is apex


def kill_when_logged(iteration: int) -> None:
    from megatron.training import get_tensorboard_writer

    from megatron_dynmoe.training.log import MetricsFile

    write = MetricsFile.write

    def write_and_die(self, record, *args, **kwargs):
        write(self, record, *args, **kwargs)
        if record.get("iteration") == iteration:
            if writer := get_tensorboard_writer():
                writer.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    MetricsFile.write = write_and_die
