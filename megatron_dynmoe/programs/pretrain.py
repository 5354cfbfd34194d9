"""Pretrain a dynamic MoE language model with Megatron: each token chooses how many experts it uses."""

import os
import sys

from megatron_dynmoe import __version__
from megatron_dynmoe.launch.parent import end_with_parent, under_torchrun

HELP = f"""usage: torchrun --nproc-per-node RANKS $(which dynmoe-pretrain) FLAGS
       dynmoe-pretrain FLAGS        one rank

{__doc__}

Most of Megatron's flags, and one for each setting of the routing:
  --num-experts E                   experts of a layer
  --moe-preset NAME                 a published system; --help-all lists them
  --moe-rule RULE                   how a token chooses; wins over the preset, as all flags do
  --expert-model-parallel-size N    ranks that share the experts
  --moe-metrics-file FILE           losses and experts per token, a line an interval; dynmoe-report reads it
  --help-all                        every flag, those of the routing under "dynamic MoE"; takes some seconds
  --version                         of this package

example, on the CPU of any machine and on made-up data:
  torchrun --nproc-per-node 2 $(which dynmoe-pretrain) --expert-model-parallel-size 2 \\
      --num-experts 4 --moe-ffn-hidden-size 128 --moe-preset dynamic-moe --num-layers 2 --hidden-size 64 \\
      --num-attention-heads 4 --normalization RMSNorm --swiglu --disable-bias-linear \\
      --position-embedding-type rope --seq-length 64 --max-position-embeddings 64 \\
      --micro-batch-size 4 --global-batch-size 8 --train-iters 20 --lr 3e-3 --eval-iters 0 --eval-interval 100 \\
      --log-interval 5 --mock-data --split 100,0,0 --tokenizer-type NullTokenizer --vocab-size 255
"""


def main(argv: list[str] | None = None) -> int:
    """Check the data, then train; the exit codes are those of :func:`megatron_dynmoe.training.pretrain.main`."""
    if under_torchrun():
        end_with_parent()  # from here on, not after the seconds that Megatron's import takes
    words = list(sys.argv[1:] if argv is None else argv)
    if "--version" in words or {"-h", "--help"} & set(words):
        print(f"megatron_dynmoe {__version__}" if "--version" in words else HELP.rstrip())
        return 0
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & set(os.environ):
        # started by itself, it is the only rank: it meets nobody, at a port that the system chooses
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    from megatron_dynmoe import host

    host.enable()  # before Megatron is imported; where CUDA is, mends what is at fault there too

    from megatron_dynmoe.data import validate_indexed
    from megatron_dynmoe.training import pretrain

    return pretrain.main(
        ["--help" if word == "--help-all" else word for word in words],
        check_data=lambda prefix, size: validate_indexed(prefix, vocab_size=size),
    )


# The first checkpoint starts helper processes, which import the program again under this name: this module, the wheel's
# script or the checkout's file. (In the program itself multiprocessing has the name stand for __main__.) Such a helper
# must not outlive its rank.
if sys.modules.get("__mp_main__") not in (None, sys.modules["__main__"]):
    end_with_parent()

if __name__ == "__main__":
    sys.exit(main())
