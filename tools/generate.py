#!/usr/bin/env python
"""Continue prompts with an exported model. The same as `dynmoe-generate`."""

import sys

from megatron_dynmoe.programs.generate import main

if __name__ == "__main__":
    sys.exit(main())
