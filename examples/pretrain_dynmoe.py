"""Pretrain a dynamic MoE language model.

    torchrun --nproc-per-node 2 examples/pretrain_dynmoe.py <megatron's flags> --moe-preset dynamic-moe

All of Megatron's flags keep their meaning; ``--help`` shows them and, under "dynamic MoE", ours.
"""

import sys


def main() -> int:
    """Check the data, then train."""
    from megatron_dynmoe import host

    host.enable()  # before Megatron is imported; where CUDA is, mends what is at fault there too

    from megatron_dynmoe.data import validate_indexed
    from megatron_dynmoe.training import pretrain

    return pretrain.main(check_data=lambda prefix, size: validate_indexed(prefix, vocab_size=size))


# Imports stay inside: the first checkpoint starts a helper process, which imports this file again.
if __name__ == "__main__":
    sys.exit(main())
