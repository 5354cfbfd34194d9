"""The model, the layouts and the flags of the parity tests."""

from __future__ import annotations

import json
from pathlib import Path

# Four layers, so that two pipeline stages can be interleaved; odd widths would not divide by TP.
MODEL = """
    --num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 32
    --max-position-embeddings 32 --position-embedding-type rope --normalization RMSNorm --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights --vocab-size 128 --make-vocab-size-divisible-by 8
    --num-experts 4 --moe-ffn-hidden-size 48 --moe-shared-expert-intermediate-size 16 --moe-layer-freq [1,0,1,1]
    --moe-token-dispatcher-type alltoall
    --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.2
    --micro-batch-size 2 --global-batch-size 8 --train-iters 100 --lr 1e-3 --clip-grad 1.0
    --eval-iters 0 --eval-interval 1000 --log-interval 1 --num-workers 0 --tokenizer-type NullTokenizer
    --ckpt-format torch_dist --mock-data --split 100,0,0 --dist-ckpt-optim-fully-reshardable
    --moe-preset dynamic-moe --moe-z-loss-coeff 1e-3
""".split()

# name -> (ranks, flags); a checkpoint is handed on in this order
LAYOUTS = {
    "serial": (1, ""),
    "dp2": (2, ""),
    "ep2": (2, "--expert-model-parallel-size 2 --moe-dispatch-unit expert"),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "tp2-sp-etp1": (2, "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "vpp2": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "ep2-rank": (2, "--expert-model-parallel-size 2 --moe-dispatch-unit rank"),
    "etp2-rank": (2, "--tensor-model-parallel-size 2 --sequence-parallel --moe-dispatch-unit rank"),
    "tp2-ep2-rank": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
        "--expert-tensor-parallel-size 2 --moe-dispatch-unit rank",
    ),
    "ep2-auto": (2, "--expert-model-parallel-size 2 --moe-dispatch-unit auto"),
    "allgather": (2, "--expert-model-parallel-size 2 --moe-token-dispatcher-type allgather"),
    "overlap": (2, "--expert-model-parallel-size 2 --moe-shared-expert-overlap"),
    "sequential": (2, "--expert-model-parallel-size 2 --moe-expert-backend sequential"),
    "recompute": (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    "recompute-moe": (1, "--recompute-granularity selective --recompute-modules moe"),
    "tp2-ep2": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
        "--expert-tensor-parallel-size 1",
    ),
}

# The distributed optimizer keeps its state in a format of its own; layouts that use it hand over among themselves.
DISTRIBUTED_OPTIMIZER = {
    "serial-distopt": (1, "--use-distributed-optimizer"),  # first: initial weights depend on the layout
    "ep2-distopt": (2, "--expert-model-parallel-size 2 --use-distributed-optimizer"),
    "pp2-distopt": (2, "--pipeline-model-parallel-size 2 --use-distributed-optimizer"),
    "tp2-ep2-distopt": (4, LAYOUTS["tp2-ep2"][1] + " --use-distributed-optimizer"),
    "dp2-distopt": (2, "--use-distributed-optimizer"),
    "dp2-overlap": (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
}


def flags(layout: str, *extra: str) -> list[str]:
    """The command line of one layout."""
    return [*MODEL, *(LAYOUTS | DISTRIBUTED_OPTIMIZER)[layout][1].split(), *extra]


def read_metrics(path: Path) -> list[dict]:
    """The training records of a metrics file."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if "lm_loss" in record]


def read_scalars(folder: Path, name: str) -> dict[int, float]:
    """One scalar of a TensorBoard folder, by iteration."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}
