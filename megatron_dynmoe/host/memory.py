"""Memory in use: that of the process."""

import resource
import sys
from collections import defaultdict
from contextlib import ExitStack
from typing import Any

import torch

from megatron_dynmoe.host.replace import replace


def _resident(device: Any = None) -> int:
    """Bytes of this process that are in memory now; the peak where the system does not say (no /proc)."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except OSError:
        return _resident_peak()


def _resident_peak(device: Any = None) -> int:
    """Bytes of this process that were in memory at most (Linux counts KiB, macOS bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _memory_stats(device: Any = None) -> dict[str, int]:
    stats: dict[str, int] = defaultdict(int)
    for kind in ("allocated_bytes", "reserved_bytes"):
        stats[f"{kind}.all.current"], stats[f"{kind}.all.peak"] = _resident(), _resident_peak()
    return stats


def redirect_memory(undo: ExitStack) -> None:
    replace(
        undo,
        torch.cuda,
        memory_allocated=_resident,
        memory_reserved=_resident,
        device_memory_used=_resident,
        max_memory_allocated=_resident_peak,
        max_memory_reserved=_resident_peak,
        memory_stats=_memory_stats,
    )
