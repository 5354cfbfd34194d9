"""The suite ends by itself: after a stated time every thread's stack is printed, and the run fails.

The clock also runs while the interpreter ends, where a thread that nobody wakes would keep a run that has passed. It is
one of C and needs no lock of Python's. Ranks that tests started end with the process that started them.
"""

import faulthandler
import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("suite_limit_minutes", "end the whole run after so many minutes, with every thread's stack")


def pytest_configure(config: pytest.Config) -> None:
    minutes = float(config.getini("suite_limit_minutes") or 0)
    if minutes > 0:
        terminal = os.dup(2)  # pytest puts a file in the place of 2 while a test runs
        faulthandler.dump_traceback_later(60 * minutes, exit=True, file=terminal)
