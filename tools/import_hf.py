#!/usr/bin/env python
"""Import an exported Hugging Face folder as a distributed checkpoint. The same as `dynmoe-import`."""

import sys

from megatron_dynmoe.programs.import_hf import main

if __name__ == "__main__":
    sys.exit(main())
