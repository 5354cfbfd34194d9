"""Which unit to put on the wire, from the counts that every rank has."""

from __future__ import annotations

from megatron_dynmoe.routing import RoutePlan

# Per-rank rows copy and sum on both sides of the wire, which costs memory traffic that per-expert rows do not have.
# They are chosen when they save at least this share of the bytes; benchmarks/README.md has the measurement.
SAVING = 0.2


def wire_bytes(unit: str, *, rows: int, pairs: int, width: int, itemsize: int, local_experts: int) -> int:
    """Bytes of one dispatch (rows and float32 weights), for ``rows`` or ``pairs`` that cross."""
    if unit == "expert":
        return rows * (width * itemsize + 4)
    return pairs * (width * itemsize + 4 * local_experts)


def choose_unit(plan: RoutePlan, *, width: int, itemsize: int, saving: float = SAVING) -> str:
    """ "rank" if it moves at least ``saving`` fewer bytes than "expert" over the whole group in this step.

    All ranks have the same totals, so all choose alike.

    Args:
        plan: of this step.
        width: D.
        itemsize: bytes of one element of the hidden states.
    """
    local = len(plan.received_PRL[0][0])
    if len(plan.pairs_sent_R) == 1:
        return "expert"
    sizes = {
        unit: wire_bytes(
            unit, rows=plan.total_rows, pairs=plan.total_pairs, width=width, itemsize=itemsize, local_experts=local
        )
        for unit in ("expert", "rank")
    }
    return "rank" if sizes["rank"] <= (1 - saving) * sizes["expert"] else "expert"
