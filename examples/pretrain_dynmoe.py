"""Pretrain a dynamic MoE language model. The same as `dynmoe-pretrain`.

torchrun --nproc-per-node 2 examples/pretrain_dynmoe.py <megatron's flags> --moe-preset dynamic-moe
"""

import sys

from megatron_dynmoe.programs.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
