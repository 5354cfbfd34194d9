"""Encode jsonl shards into Megatron's indexed datasets. The same as `dynmoe-preprocess`."""

import sys

from megatron_dynmoe.programs.preprocess_data import main

if __name__ == "__main__":
    sys.exit(main())
