"""What a row on the wire is and has: its bytes, and the rule of ``--moe-dispatch-unit auto``, for dispatch and plan.

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

WEIGHT = 4  # bytes of one expert's weight: float32, whatever the model's dtype
MEASURED_SAVING = 0.2
MEMORY_BANDWIDTH = 3e12  # bytes/s of one GPU
LINK_BANDWIDTH = {"node": 300e9, "network": 50e9}  # bytes/s that a GPU sends
EXTRA_BYTES, FUSED_BYTES = 16, 8


def wire_bytes(*, width: int, itemsize: int, beside: int, ways: int = 2) -> int:
    """Bytes of one row on the wire.

    Args:
        width, itemsize: D, and bytes of one element of the hidden states.
        beside: bytes that go out with the row: :func:`weight_bytes`, or what another library sends.
        ways: 2, the dispatch and its combine; 1, the dispatch alone.
    """
    return ways * width * itemsize + beside


def weight_bytes(unit: str, local_experts: int) -> int:
    """Bytes of the weights that go out with one row: one (unit "expert"), or one a local expert ("rank")."""
    return WEIGHT * (1 if unit == "expert" else local_experts)


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


def cheaper_unit(rank_bytes: float, expert_bytes: float, saving: float, *, ranks: int) -> str:
    """ "rank" if its bytes are less than those of "expert" by at least the share ``saving``; not on one rank."""
    return "rank" if ranks > 1 and rank_bytes <= (1 - saving) * expert_bytes else "expert"
