"""A rank of tests/host/test_mixed_groups.py: train, look at every main copy after every step, write state down."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests import ranks
from tests.training.test_adaptive_parallel import check_every_update

INITS = ("keep", "fresh", "copy")  # what the first, second, third update does, and so on again


def pretrain(argv: list[str], out: Path) -> int:
    """The training entry; the optimizer's state before the first step and after the last goes to ``out``.

    Experts 0 and 4 start with thresholds that nobody passes, so that tokens go without and updates add experts.
    """
    from megatron_dynmoe.mcore.controllers import Driver
    from megatron_dynmoe.routers import RULES

    thresholds = torch.zeros(8)
    thresholds[[0, 2, 4, 6]] = torch.tensor([3.0, 0.1, 0.95, 0.6])
    start = replace(RULES["top-any"], parameters=lambda *_: {"thresholds": thresholds.clone()})
    RULES["top-any"] = start
    check_every_update()
    _update_in_turn()
    _check_every_step(Driver, out)
    try:
        return ranks.pretrain(argv)
    finally:
        (driver,) = [thing for thing in gc.get_objects() if isinstance(thing, Driver)]
        _write_down(driver, out, "end")


def _update_in_turn() -> None:
    from megatron_dynmoe.routers.adaptation import Adaptation

    update = Adaptation._update

    def update_with_its_init(self: Any, state: Any, step: Any) -> Any:
        self.config = replace(self.config, added_expert_init=INITS[step.iteration // 2 % len(INITS)])
        return update(self, state, step)

    Adaptation._update = update_with_its_init


def _check_every_step(driver_class: type, out: Path) -> None:
    watch, after_step = driver_class._watch, driver_class.after_step

    def watch_and_write(self: Any, chunk: Any) -> None:
        first = not self.chunks
        watch(self, chunk)
        if first:
            _write_down(self, out, "start")

    def check_after_step(self: Any, iteration: int, *, taken: bool) -> None:
        after_step(self, iteration, taken=taken)
        self.gather_weights()
        for _, parameter, kept, begin in _kept(self):
            mine = parameter.detach().flatten()[begin : begin + kept["param"].numel()]
            assert torch.equal(mine, kept["param"].detach().flatten().to(mine.dtype)), (iteration, parameter.shape)

    driver_class._watch, driver_class.after_step = watch_and_write, check_after_step


def _kept(driver: Any) -> list[tuple[str, Any, dict[str, torch.Tensor], int]]:
    """Name, parameter, what megatron saves for it, and where that begins in the flattened parameter."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    found = []
    names = {p: name for chunk in driver.chunks for name, p in chunk.named_parameters()}
    for leaf in getattr(driver.optimizer(), "chained_optimizers", [driver.optimizer()]):
        if isinstance(leaf, DistributedOptimizer):
            for parameter in leaf.model_param_gbuf_map.keys() & names.keys():
                begin = leaf._get_model_param_range_map(parameter)["param"].start
                found.append((names[parameter], parameter, leaf._get_main_param_and_optimizer_states(parameter), begin))
        else:
            held = {id(p) for group in leaf.optimizer.param_groups for p in group["params"]}
            for parameter, name in names.items():
                main = getattr(parameter, "main_param", parameter)
                if id(main) in held:
                    found.append((name, parameter, {"param": main, **leaf.optimizer.state[main]}, 0))
    return found


def _write_down(driver: Any, out: Path, when: str) -> None:
    """(name, which) -> (begin in the whole model's parameter, values); experts' parameters begin by their rank."""
    from megatron.core.parallel_state import get_expert_model_parallel_rank

    ep, state = get_expert_model_parallel_rank(), {}
    for name, parameter, kept, begin in _kept(driver):
        begin += 0 if getattr(parameter, "allreduce", True) else ep * parameter.numel()
        tensors = {which: tensor for which, tensor in kept.items() if torch.is_tensor(tensor) and tensor.dim()}
        state |= {(name, which): (begin, tensor.detach().flatten().clone()) for which, tensor in tensors.items()}
    torch.save(state, out / f"{when}{torch.distributed.get_rank()}.pt")
