"""Which unit to put on the wire, from the counts that every rank has and from where the ranks are."""

from __future__ import annotations

import socket
import zlib

import torch
import torch.distributed as dist

from megatron_dynmoe.routing import RoutePlan
from megatron_dynmoe.units import MEASURED_SAVING, cheaper_unit, weight_bytes, wire_bytes


def choose_unit(plan: RoutePlan, *, width: int, itemsize: int, saving: float = MEASURED_SAVING) -> str:
    """ "rank" if it moves at least ``saving`` fewer bytes than "expert" over the whole group in this step.

    All ranks have the same totals, so all choose alike.

    Args:
        plan: of this step.
        width: D.
        itemsize: bytes of one element of the hidden states.
        saving: :func:`megatron_dynmoe.units.saving_wanted` of the group's link; the same on all its ranks.
    """
    local = len(plan.received_PRL[0][0])
    sizes = {
        unit: rows * wire_bytes(width=width, itemsize=itemsize, beside=weight_bytes(unit, local), ways=1)
        for unit, rows in (("expert", plan.total_rows), ("rank", plan.total_pairs))
    }
    return cheaper_unit(sizes["rank"], sizes["expert"], saving, ranks=len(plan.pairs_sent_R))


def leaves_node(group: dist.ProcessGroup | None, device: torch.device) -> bool:
    """Whether ``group`` has ranks on more than one machine; every rank of it calls this, and all get the same answer.

    Machines are told apart by their names, which the ranks tell each other: an environment variable would be each
    launcher's own, and on machines with different numbers of GPUs ranks would compute different answers from it.

    Args:
        group: its ranks exchange one integer each; ``None`` or one rank: nothing is exchanged.
        device: where the group's backend communicates.
    """
    if group is None or dist.get_world_size(group) == 1:
        return False
    mine = torch.tensor([zlib.crc32(socket.gethostname().encode())], dtype=torch.int64, device=device)
    names = mine.new_empty(dist.get_world_size(group))
    dist.all_gather_into_tensor(names, mine, group=group)
    return len(set(names.tolist())) > 1
