#!/usr/bin/env python
"""Plan a training run on paper. The same as `dynmoe-plan`."""

import sys

from megatron_dynmoe.programs.plan_cluster import main

if __name__ == "__main__":
    sys.exit(main())
