"""The dataset helper's Makefile, which megatron-core's wheel lacks."""

import functools
import importlib
from contextlib import ExitStack

from megatron_dynmoe.host.replace import replace


def skip_compile_helpers(undo: ExitStack) -> None:
    from megatron.core.datasets import utils

    compile_helpers = utils.compile_helpers

    @functools.wraps(compile_helpers)
    def compile_helpers_if_missing() -> None:
        try:
            importlib.import_module("megatron.core.datasets.helpers_cpp")
        except ImportError:
            compile_helpers()

    replace(undo, utils, compile_helpers=compile_helpers_if_missing)
