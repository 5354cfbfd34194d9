"""Pretrain a dynamic MoE language model.

    torchrun --nproc-per-node 2 examples/pretrain_dynmoe.py <megatron's flags> --moe-preset dynamic-moe

docs/flags.md says of each of Megatron's flags who honours it; ``--help`` shows them and, under "dynamic MoE", ours.
"""

import sys


def main() -> int:
    """Check the data, then train."""
    from megatron_dynmoe.launch.parent import end_with_parent, under_torchrun

    if under_torchrun():
        end_with_parent()  # from here on, not after the seconds that Megatron's import takes
    from megatron_dynmoe import host

    host.enable()  # before Megatron is imported; where CUDA is, mends what is at fault there too

    from megatron_dynmoe.data import validate_indexed
    from megatron_dynmoe.training import pretrain

    return pretrain.main(check_data=lambda prefix, size: validate_indexed(prefix, vocab_size=size))


# Imports stay inside: the first checkpoint starts helper processes, which import this file again.
if __name__ == "__main__":
    sys.exit(main())
elif __name__ == "__mp_main__":
    from megatron_dynmoe.launch.parent import end_with_parent

    end_with_parent()  # such a helper must not outlive its rank
