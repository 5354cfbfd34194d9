#!/usr/bin/env python
"""Export a distributed checkpoint to a Hugging Face folder. The same as `dynmoe-export`."""

import sys

from megatron_dynmoe.programs.export_hf import main

if __name__ == "__main__":
    sys.exit(main())
