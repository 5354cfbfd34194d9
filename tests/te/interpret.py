"""TE's Triton kernels for permutation, interpreted, beside the stand-ins for them: ``python -m tests.te.interpret``.

In a process of its own, because Triton reads ``TRITON_INTERPRET`` when it is imported. Prints what differs; the exit
code is the number of differences.
"""

import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch

from megatron_dynmoe import host
from tests.te import start

start.transformer_engine(triton=True)
host.enable()

from transformer_engine.pytorch.triton import permutation as kernels  # noqa: E402
from transformer_engine_torch import permutation as stand_ins  # noqa: E402

TOKENS, EXPERTS, WIDTH = 23, 5, 12


def one_block_size() -> None:
    """No search for the fastest block: there is no clock in the interpreter."""
    for kernel in vars(kernels).values():
        if hasattr(kernel, "configs"):
            kernel.configs = kernel.configs[:1]


def case(seed: int, dtype: torch.dtype) -> dict[str, Any]:
    """A ragged map with tokens that go nowhere and an expert that nobody visits, and tensors of its shapes."""
    torch.manual_seed(seed)
    map_TE = torch.rand(TOKENS, EXPERTS) < 0.4
    map_TE[3] = False
    map_TE[:, 2] = False
    map_TE[5] = torch.tensor([True, True, False, True, True])
    weights_TE = torch.rand(TOKENS, EXPERTS) * map_TE
    weights_TE[5, 0] = 0  # chosen, and its weight underflowed
    rows = int(map_TE.sum())
    return {
        "map": map_TE,
        "x": torch.randn(TOKENS, WIDTH, dtype=dtype),
        "weights": weights_TE,
        "rows": torch.randn(rows, WIDTH, dtype=dtype),
        "row_weights": torch.rand(rows),
        "pads": torch.arange(EXPERTS, dtype=torch.int32) * 3,
    }


def results(module: Any, data: dict[str, Any]) -> dict[str, Any]:
    """Every launcher of a module on one case. Padded buffers are zeros, others hold what was written."""
    E, N = EXPERTS, len(data["rows"])
    row_id_map = module.make_row_id_map(data["map"], TOKENS, E)
    padded = N + 3 * (E - 1)
    far = torch.randn(padded, WIDTH, generator=torch.Generator().manual_seed(9)).to(data["x"].dtype)
    splits, order = torch.tensor([4, 0, 9, 2]), torch.tensor([2, 0, 3, 1])
    chunks = module.make_chunk_sort_map(splits, order, TOKENS, 4)
    used = torch.arange(E) < row_id_map[:, -1:]
    weight = torch.rand(TOKENS, generator=torch.Generator().manual_seed(8))
    x, w, pads = data["x"], data["weights"], data["pads"]
    return {
        "rows of a token": row_id_map[:, :E][used],
        "experts of a token": row_id_map[:, E : 2 * E][used],
        "number of rows": row_id_map[:, -1],
        "permute": module.permute_with_mask_map(x, row_id_map, w, None, None, TOKENS, E, N, WIDTH, None),
        "permute, padded": module.permute_with_mask_map(x, row_id_map, w, None, pads, TOKENS, E, padded, WIDTH, None),
        "permute, strided": module.permute_with_mask_map(
            x, row_id_map, w.T.contiguous().T, None, None, TOKENS, E, N, WIDTH, None
        ),
        "unpermute": module.unpermute_with_mask_map(
            data["rows"], row_id_map, None, data["row_weights"], None, TOKENS, E, WIDTH
        ),
        "unpermute, weighted and padded": module.unpermute_with_mask_map(
            far, row_id_map, w, None, pads, TOKENS, E, WIDTH
        ),
        "gradients": module.unpermute_with_mask_map_bwd_with_merging_probs(
            x, row_id_map, data["rows"], w, None, TOKENS, E, N, WIDTH
        ),
        "chunks": chunks,
        "sort": module.sort_chunks_by_map(x, chunks, weight, TOKENS, WIDTH, True),
        "sort back": module.sort_chunks_by_map(x, chunks, weight, TOKENS, WIDTH, False),
    }


def compare() -> int:
    """How many results differ: sums in another order may, by four roundings of their type; all else may not."""
    one_block_size()
    wrong = 0
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        data = case(seed, dtype)
        theirs, ours = results(kernels, data), results(stand_ins, data)
        for name, value in theirs.items():
            pairs = zip(*(v if isinstance(v, tuple) else (v,) for v in (value, ours[name])), strict=True)
            for place, (their, our) in enumerate(pairs):
                if their is None and our is None:
                    continue
                sums = name.startswith("unpermute") or name == "gradients"
                close = {"rtol": 4 * torch.finfo(their.dtype).eps, "atol": 1e-6} if sums else {"rtol": 0, "atol": 0}
                try:
                    torch.testing.assert_close(our, their, **close)
                except AssertionError as error:
                    wrong += 1
                    print(f"{dtype}: {name}, result {place}: {error}")
    return wrong


if __name__ == "__main__":
    sys.exit(compare())
