"""The real libraries where they are; here the lines that test them, with the stand-in in their place."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from tests import deep_ep_real, deep_ep_standin, flex_ranks, ranks


def run(backend):
    where = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(ranks._free_port())]
    command = [sys.executable, "-m", *where, "-m", "tests.deep_ep_real", backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.mark.deepep
def test_deepep_is_what_its_stand_in_says():
    run("deepep")


@pytest.mark.hybridep
def test_hybridep_is_what_its_stand_in_says():
    run("hybridep")


def _with_stand_in():
    flex_ranks.setup()
    for backend in flex_ranks.BACKENDS:
        deep_ep_real.contract(deep_ep_standin, backend, "cpu", dist.group.WORLD)


def _hand_worked():
    """Two ranks of two experts: rank 0 has tokens 0, 1, 2 and rank 1 token 10; the values are the tokens' numbers."""
    flex_ranks.setup()
    rank = dist.get_rank()
    tokens = [[0.0], [1.0], [2.0]] if rank == 0 else [[10.0]]
    x = torch.tensor(tokens).expand(-1, 16).contiguous()
    chosen = torch.tensor([[3, 0], [1, -1], [-1, -1]] if rank == 0 else [[2, 3]])
    weights = torch.tensor([[0.5, 0.25], [1.0, 0.0], [0.0, 0.0]] if rank == 0 else [[0.125, 0.75]])
    buffer = deep_ep_standin.Buffer(dist.group.WORLD)
    per_rank, _, per_expert, visits, _ = buffer.get_dispatch_layout(chosen, 4)
    assert per_rank.tolist() == ([2, 1] if rank == 0 else [0, 1])
    assert per_expert.tolist() == ([1, 1, 0, 1] if rank == 0 else [0, 0, 1, 1])
    layout = {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert, "is_token_in_rank": visits}
    rows, index, weight, counts, handle, _ = buffer.dispatch(x, topk_idx=chosen, topk_weights=weights, **layout)
    assert rows[:, 0].tolist() == ([0, 1] if rank == 0 else [0, 10])
    assert index.tolist() == ([[-1, 0], [1, -1]] if rank == 0 else [[1, -1], [0, 1]])
    assert weight.tolist() == ([[0, 0.25], [1, 0]] if rank == 0 else [[0.5, 0], [0.125, 0.75]])
    assert counts == ([1, 1] if rank == 0 else [1, 2])
    out, back, _ = buffer.combine(rows + 100, handle, topk_weights=weight)
    assert out[:, 0].tolist() == ([200, 101, 0] if rank == 0 else [110]) and torch.equal(back, weights)
    # the same in HybridEP's words: a token more for rank 1, which goes nowhere, so that both have three
    map_TE = torch.zeros(3, 4, dtype=torch.bool)
    for token, row in enumerate(chosen.tolist()):
        map_TE[token, [expert for expert in row if expert >= 0]] = True
    x = torch.cat([x, x.new_zeros(3 - len(x), 16)])
    probs = map_TE * torch.tensor([1.0, 2.0, 3.0, 4.0])
    hybrid = deep_ep_standin.HybridEPBuffer(dist.group.WORLD, 16, 3, 2)
    sent = {"hidden": x, "routing_map": map_TE, "probs": probs, "num_of_experts_per_rank": 2}
    rows, weight, _, counts, handle = hybrid.dispatch_with_permute(**sent, pad_multiple=2)
    assert counts.tolist() == [2, 2]
    assert rows[:, 0].tolist() == ([0, 0, 1, 0] if rank == 0 else [10, 0, 0, 10])
    assert weight.tolist() == ([1, 0, 2, 0] if rank == 0 else [3, 0, 4, 4])
    out, back = hybrid.combine_with_unpermute(hidden=rows + 100, probs=weight, handle=handle, pad_multiple=2)
    assert out[:, 0].tolist() == ([200, 101, 0] if rank == 0 else [220, 0, 0]) and torch.equal(back, probs)
    dist.barrier()


def test_the_lines_above_run(tmp_path):
    ranks.call(_with_stand_in, ranks=2, folder=tmp_path)


def test_stand_in_by_hand(tmp_path):
    ranks.call(_hand_worked, ranks=2, folder=tmp_path)
