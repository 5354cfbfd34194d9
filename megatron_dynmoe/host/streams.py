"""Streams and events: the CPU has one stream and is always in step."""

from contextlib import ExitStack
from typing import Any

import torch

from megatron_dynmoe.host.replace import replace


class _Stream(torch.cpu.Stream):
    """torch's CPU stream, with the constructor and the methods that megatron uses of CUDA's."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        super().__init__(priority)

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def synchronize(self) -> None:
        """Nothing is ever pending."""

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()


class _Event(torch.cpu.Event):
    """torch's CPU event, with the constructor of CUDA's."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, **_: Any) -> None:
        super().__init__()


def redirect_streams(undo: ExitStack) -> None:
    stream = _Stream()
    replace(
        undo,
        torch.cuda,
        Stream=_Stream,
        Event=_Event,
        stream=torch.cpu.stream,
        current_stream=lambda device=None: stream,
        synchronize=lambda device=None: None,
    )
