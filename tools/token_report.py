#!/usr/bin/env python
"""Shade each token of a text by the experts it used. The same as `dynmoe-report tokens`."""

import sys

from megatron_dynmoe.programs.token_report import main

if __name__ == "__main__":
    sys.exit(main())
