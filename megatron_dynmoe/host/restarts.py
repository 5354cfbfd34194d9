"""The store of torchrun's agent, which torch 2.13 keeps over restarts of the ranks.

Its comment (``rendezvous.py``, ``_create_c10d_store``) says that there is a new store for every retry. That holds no
longer since the rendezvous shares one (``dynamic_rendezvous.py``; ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE``). Process
groups are made from keys that count from zero, so restarted ranks read the addresses of those that died, and wait for
them until the timeout. Here each restart has keys of its own.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from unittest import mock

from torch.distributed import PrefixStore, Store


def keys_for_each_restart(undo: ExitStack) -> None:
    # torch.distributed.rendezvous is a function as well as the module that has it
    handlers = vars(importlib.import_module("torch.distributed.rendezvous"))["_rendezvous_handlers"]
    undo.enter_context(mock.patch.dict(handlers, env=_with_restart(handlers["env"])))


def _with_restart(handler: Callable[..., Iterator[tuple[Store, int, int]]]) -> Callable:
    def env(url: str, **kwargs: object) -> Iterator[tuple[Store, int, int]]:
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        for store, rank, world_size in handler(url, **kwargs):
            yield (PrefixStore(f"restart{restart}", store) if shared and restart != "0" else store), rank, world_size

    return env
