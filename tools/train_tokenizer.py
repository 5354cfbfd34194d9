"""Train a tokenizer on a sample of a corpus. The same as `dynmoe-tokenizer`."""

import sys

from megatron_dynmoe.programs.train_tokenizer import main

if __name__ == "__main__":
    sys.exit(main())
