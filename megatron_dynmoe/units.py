"""What a row on the wire should be: the rule of ``--moe-dispatch-unit auto``, for the dispatch and the plan alike.

A (token, rank) row spares bytes on the wire and costs memory traffic: its receiver copies it to each of its experts and
sums their outputs in float32.  For an element of a (token, expert) row, forward, in a 2-byte dtype:

    wire    4 B, out and back
    memory  16 B more: 4 to copy, 20 to widen and to sum, less 8 for the sort by expert that is not needed then
            8 B more where Transformer Engine's kernels would have permuted (token, expert) rows, without float32 sums

With bandwidths B of the link and M of memory, a saving s of the bytes pays where s * 4 / B exceeds memory / M, that is
above s = memory * B / (4 M).  At M = 3 TB/s: inside a node, with NVLink at B = 300 GB/s, 0.6 with the kernels and 0.4
without; between nodes, at 50 GB/s, 0.1 and 0.07.  These are estimates from data sheets; nobody has measured them.
Measured is 0.2, on a CPU, where bytes cost next to nothing (benchmarks/README.md).  It is the least asked for anywhere,
because the copies and sums are more launches as well.
"""

from __future__ import annotations

MEASURED_SAVING = 0.2
MEMORY_BANDWIDTH = 3e12  # bytes/s of one GPU
LINK_BANDWIDTH = {"node": 300e9, "network": 50e9}  # bytes/s that a GPU sends
EXTRA_BYTES, FUSED_BYTES = 16, 8


def saving_wanted(link: str, *, fused: bool) -> float:
    """The share of the bytes that (token, rank) rows must save to be chosen.

    Args:
        link: what joins the expert-parallel ranks: "host" (no GPUs), "node" (all on one node) or "network".
        fused: whether (token, expert) rows would be permuted by Transformer Engine's kernels.
    """
    if link == "host":
        return MEASURED_SAVING
    extra = EXTRA_BYTES + (FUSED_BYTES if fused else 0)
    return max(MEASURED_SAVING, extra * LINK_BANDWIDTH[link] / (4 * MEMORY_BANDWIDTH))


def cheaper_unit(rank_bytes: float, expert_bytes: float, saving: float) -> str:
    """ "rank" if its bytes are less than those of "expert" by at least the share ``saving``."""
    return "rank" if rank_bytes <= (1 - saving) * expert_bytes else "expert"
