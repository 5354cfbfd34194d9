"""NaN or Inf in the loss or a gradient: the job ends, and says in which iteration, on which rank and in which layer.

Megatron's rerun state machine finds it: when any rank's loss or gradient is not finite, all ranks run the iteration a
second time, from the same batches and random numbers, before the optimizer steps. This module watches that second run
with hooks on every module, which ordinary steps do not have, and ends the job when it is over. Megatron itself would
save a checkpoint (and fail without ``--save``) and ask to be restarted on another GPU, where the same batch comes
again; here the last good checkpoint stays the newest, and the exit code is one that the supervisor does not restart.

The origin is the module whose inputs and weights are finite and whose output is not; in the backward pass, the layer
whose output has a finite gradient and whose input has not. NaN that came from another rank (pipeline, experts) is an
input here, so the origin is named by the rank that made it, and the earliest micro-batch and layer of all ranks wins.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.rerun_state_machine import RerunMode, RerunState, get_rerun_state_machine
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args
from megatron.training.async_utils import maybe_finalize_async_save
from torch import Tensor, nn

from megatron_dynmoe.errors import UserError
from megatron_dynmoe.launch import outcome
from megatron_dynmoe.routers.routing import Routing

SECOND_RUN = (RerunState.RERUNNING_IN_PLACE, RerunState.RERUNNING_FROM_CHECKPOINT)
OUTPUT_LAYER = "the output layer"


class NotANumberError(UserError):
    """The loss or a gradient is NaN or infinite, twice from the same batch."""

    code = outcome.NOT_A_NUMBER


class TransientError(NotANumberError):
    """NaN or Inf that did not come again from the same batch; a restart may go well."""

    code = 1


class Origin(NamedTuple):
    """Where the first number that is not finite was made; origins are compared in this order."""

    backward: bool
    micro_batch: int  # from 1; 0 in the backward pass
    layer: float  # from 1 over all pipeline stages; negative in the backward pass, which starts at the last
    rank: int
    host: str
    words: str


class Watch:
    """Hooks on the modules of this rank's part of the model, and what they found."""

    def __init__(self) -> None:
        self.origin: Origin | None = None
        self.steps: Counter[int] = Counter()  # micro-batches of each part of the model
        self.micro_batch = 0
        self.hooks: list[Any] = []

    def before_step(self, model: nn.Module) -> None:
        """Call it before each forward step; puts hooks on ``model`` in the second run of an iteration."""
        if not model.training:
            return
        # Else Megatron lets the first step after a start go into the weights unseen: it could not save there.
        get_rerun_state_machine().first_iteration_complete = True
        if not _in_second_run():
            return
        self.steps[id(model)] += 1
        self.micro_batch = self.steps[id(model)]
        if self.micro_batch == 1:
            for _, module, layer, place in _places(model):
                after = partial(self._after, layer, place)
                self.hooks.append(module.register_forward_hook(after, with_kwargs=True))

    def _after(self, layer: float, place: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        inputs = list(_tensors((args, kwargs)))
        whole = isinstance(module, TransformerLayer)
        if whole or place == OUTPUT_LAYER:
            for tensor in inputs:
                if tensor.requires_grad:
                    tensor.register_hook(partial(self._gradient, layer, place))
        # Inside a layer, -inf masks what cannot be chosen.
        if self.origin or not any(_bad(tensor, whole) for tensor in _tensors(output)):
            return
        if any(_bad(tensor, whole) for tensor in inputs):
            return
        weights = [name for name, weight in module.named_parameters() if _bad(weight, True)]
        because = f", whose weight {weights[0]} is not finite" if weights else ""
        self._found(layer, f"the output of {place}{because}", micro_batch=self.micro_batch)

    def _gradient(self, layer: float, place: str, gradient: Tensor) -> None:
        if self.origin is None and _bad(gradient, True):
            self._found(-layer, f"the gradient that leaves {place}", backward=True)

    def _found(self, order: float, words: str, *, backward: bool = False, micro_batch: int = 0) -> None:
        rank, host = torch.distributed.get_rank(), socket.gethostname()
        self.origin = Origin(backward, micro_batch, order, rank, host, words)

    def after_gradients(self, model: list[nn.Module], *args: Any, **kwargs: Any) -> None:
        """Megatron's ``finalize_model_grads``, and the end of a second run.

        Raises:
            NotANumberError: on all ranks together; the loss or a gradient was not finite a second time.
            TransientError: the second run was finite.
        """
        second = _in_second_run()
        if second and self.origin is None:
            self._look_at_gradients(model)
        finalize_model_grads(model, *args, **kwargs)
        if second:
            self._decide()

    def _look_at_gradients(self, model: list[nn.Module]) -> None:
        for chunk in model:
            for name, module, layer, place in _places(chunk):
                for weight_name, weight in module.named_parameters(recurse=False):
                    gradient = getattr(weight, "main_grad", None)
                    if gradient is not None and _bad(gradient, True):
                        where = f"{place}, weight {name}.{weight_name}"
                        return self._found(-layer, f"the gradient of {where}", backward=True)

    def _decide(self) -> None:
        machine = get_rerun_state_machine()
        from_checkpoint = machine.state is RerunState.RERUNNING_FROM_CHECKPOINT
        call = machine.failed_validation_call if machine.rerun_requested or from_checkpoint else None
        message = None if call is None or machine.continue_requested else call.caller.message
        again = machine.checkpoint_requested or from_checkpoint
        told: list[Any] = [None] * torch.distributed.get_world_size()
        mine = (message, again, torch.distributed.get_rank(), socket.gethostname(), self.origin)
        torch.distributed.all_gather_object(told, mine)
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self.steps.clear()
        failed = [one for one in told if one[0]]
        if not failed:  # something unexpected that Megatron goes on with
            self.origin = None
            return
        maybe_finalize_async_save(blocking=True, terminate=True)
        message, _, rank, host, _ = failed[0]
        where = f"iteration {get_args().curr_iteration + 1}, rank {rank} on {host}: {message}"
        if not any(one[1] for one in failed):
            raise TransientError(f"{where}; a second run of the same batch was finite, which points to the hardware.")
        raise NotANumberError(f"{where}; {_say(sorted(one[4] for one in told if one[4]))}. {_advice()}")


def refused_unwatched(error: RuntimeError) -> str | None:
    """The sentence for NaN that Megatron refuses at once: in evaluation, and with ``--rerun-mode disabled``."""
    where = str(error).partition("Unexpected result ")
    if not where[1]:
        return None
    rank, host, iteration = torch.distributed.get_rank(), socket.gethostname(), get_args().curr_iteration + 1
    return f"iteration {iteration}, rank {rank} on {host}: unexpected result {where[2]}. Nothing was saved after it."


def _say(origins: list[Origin]) -> str:
    if not origins:
        return "every module's output is finite"
    first = origins[0]
    micro_batch = f", micro-batch {first.micro_batch}" if first.micro_batch else ""
    return f"it is first in {first.words} (rank {first.rank} on {first.host}{micro_batch})"


def _advice() -> str:
    args = get_args()
    kept = f"Nothing was saved, and the last good checkpoint stays in {args.save}" if args.save else "Nothing was saved"
    skip = f"--iterations-to-skip {args.curr_iteration + 1} leaves it out"
    return f"{kept}; a restart meets the same batch ({skip})."


def _in_second_run() -> bool:
    machine = get_rerun_state_machine()
    return machine.mode is RerunMode.VALIDATE_RESULTS and machine.state in SECOND_RUN


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, float, str]]:
    """Name, module, number of the layer it lies in and words for it, of every module."""
    layer, prefix, after = 0.0, "", get_args().num_layers + 1.0
    for name, module in get_attr_wrapped_model(model, "decoder", return_model_obj=True).named_modules():
        if isinstance(module, TransformerLayer):
            layer, prefix = float(module.layer_number), f"{name}."
            yield name, module, layer, f"layer {layer:.0f}"
        elif prefix and name.startswith(prefix):
            yield name, module, layer, f"layer {layer:.0f} ({name.removeprefix(prefix)})"
        elif name == "output_layer":
            yield name, module, after, OUTPUT_LAYER
        else:
            yield name, module, 0.0 if name.startswith("embedding") else after, name or "the model"


def _bad(tensor: Tensor, strict: bool) -> bool:
    if not tensor.is_floating_point():
        return False
    tensor = tensor.detach()
    return bool((~tensor.isfinite()).any() if strict else (tensor.isnan() | (tensor == torch.inf)).any())


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Routing):
        values = (values.weights_TC, values.logits_TC)
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
