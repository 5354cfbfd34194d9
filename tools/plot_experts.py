#!/usr/bin/env python
"""Draw how many experts each layer of a run had and used. The same as `dynmoe-report experts`."""

import sys

from megatron_dynmoe.programs.plot_experts import main

if __name__ == "__main__":
    sys.exit(main())
