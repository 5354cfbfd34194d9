"""Collect real text from this machine as jsonl shards. The same as `dynmoe-corpus`."""

import sys

from megatron_dynmoe.programs.collect_corpus import main

if __name__ == "__main__":
    sys.exit(main())
