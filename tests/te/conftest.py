"""For this leg: ranks are forked from a server that has Transformer Engine; without its packages everything skips."""

import os

import pytest

from tests import ranks
from tests.te.start import packages_are_missing

ranks._context.set_forkserver_preload(["tests.te.preload"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = packages_are_missing()
    if missing and os.environ.get("TE") == "required":
        raise pytest.UsageError(missing)
    for item in items if missing else ():
        item.add_marker(pytest.mark.skip(reason=missing))
