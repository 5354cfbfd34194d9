"""NaN and Inf: the sentence names iteration, rank and the first layer, nothing is saved, and no restart follows."""

import functools
from dataclasses import replace

import pytest
import torch

from tests import ranks
from tests.layouts import flags


class Inf(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


def poisoned(argv, fault: str, on_rank: int, iteration: int, layer: int) -> int:
    """Train, with one module of ``layer`` at fault on rank ``on_rank`` from ``iteration`` on."""
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from megatron.training import get_args

    from megatron_dynmoe.mcore.router import DynamicRouter

    def due(number: int) -> bool:
        here = torch.distributed.get_rank() == on_rank and number == layer
        return here and get_args().curr_iteration + 1 >= iteration

    seen = []

    def once() -> bool:
        seen.append(None)
        return len(seen) == 1

    kind = TransformerLayer if fault == "gradient" else DynamicRouter
    forward = kind.forward

    @functools.wraps(forward)
    def faulty(module, *args, **kwargs):
        output = forward(module, *args, **kwargs)
        if module.training != (fault == "evaluation") and due(module.layer_number):
            if fault == "gradient":
                return (Inf.apply(output[0]), *output[1:])
            if fault != "transient" or once():
                return replace(output, weights_TC=output.weights_TC * torch.nan)
        return output

    kind.forward = faulty
    return ranks.pretrain(argv)


ROUTER, GRADIENT = "first in the output of layer {} (mlp.router)", "first in the gradient that leaves layer {}"
CASES = [
    # layout, fault, rank, iteration, layer, what the sentence says of the place
    ("serial", "output", 0, 2, 3, ROUTER),
    ("ep2", "output", 1, 2, 3, ROUTER),
    ("pp2", "output", 0, 2, 1, ROUTER),  # the loss is another stage's
    ("dp2", "gradient", 1, 2, 3, GRADIENT),
    # the first iteration after a start, which megatron does not look at
    ("recompute", "output", 0, 1, 3, ROUTER),
    ("pp2", "gradient", 1, 1, 3, GRADIENT),
]


def sentence_of(run) -> str:
    said = [line for rank in range(len(run.logs)) for line in run.output(rank).splitlines() if "error: " in line[:7]]
    assert len(said) == 1, "\n".join(run.output(rank)[-3000:] for rank in range(len(run.logs)))
    assert "Traceback" not in run.output()
    return said[0]


@pytest.mark.parametrize(("layout", "fault", "rank", "iteration", "layer", "place"), CASES)
def test_the_sentence_names_the_origin(tmp_path, layout, fault, rank, iteration, layer, place):
    count = 1 if layout in ("serial", "recompute") else 2
    save = tmp_path / "save"
    where = ["--save", str(save), "--save-interval", "1"] if layout in ("serial", "ep2") else []
    run = ranks.start(
        poisoned, flags(layout, *where), fault, rank, iteration, layer, ranks=count, folder=tmp_path / "run"
    )
    assert run.wait() == [17] * count
    said = sentence_of(run)
    assert f"iteration {iteration}, rank" in said and f"{place.format(layer)} (rank {rank} on " in said
    assert f"--iterations-to-skip {iteration} leaves it out" in said
    if where:
        assert f"the last good checkpoint stays in {save}" in said
        assert (save / "latest_checkpointed_iteration.txt").read_text() == "1"
        assert [path.name for path in save.glob("iter_*")] == ["iter_0000001"]
    else:
        assert "Nothing was saved;" in said


def test_a_fault_that_does_not_come_again_may_be_restarted(tmp_path):
    run = ranks.start(poisoned, flags("serial"), "transient", 0, 1, 3, ranks=1, folder=tmp_path / "run")
    assert run.wait() == [1]
    assert "points to the hardware" in sentence_of(run)


def test_evaluation_and_a_rerun_machine_that_is_off_say_it_in_one_sentence(tmp_path):
    evaluate = ["--eval-interval", "1", "--eval-iters", "1", "--split", "50,50,0"]
    for fault, extra in (("evaluation", evaluate), ("output", ["--rerun-mode", "disabled"])):
        run = ranks.start(poisoned, flags("serial", *extra), fault, 0, 1, 3, ranks=1, folder=tmp_path / fault)
        assert run.wait() == [17]
        assert "iteration 1, rank 0 on " in sentence_of(run) and "nan" in sentence_of(run)
