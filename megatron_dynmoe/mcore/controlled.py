"""A router's side of its controllers: their tensors are its buffers, and what they set is what it routes with."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from megatron.core.transformer.moe.router import Router
from torch import Tensor

from megatron_dynmoe.config import ConfigError, DynMoEConfig
from megatron_dynmoe.routers.controller import Controller, Seen
from megatron_dynmoe.routers.router_config import own_fields
from megatron_dynmoe.routers.routing import Routing


class ControlledRouter(Router):
    """megatron-core's router with the controllers of ``dynmoe``.

    In a checkpoint each of their states has its own name among the router's weights; what this rank has counted since
    the last step is not saved.  ``dynmoe`` has the settings as they stand.
    """

    dynmoe: DynMoEConfig
    columns: int

    def add_controllers(self) -> None:
        """Make the controllers and register their tensors; call it when everything else has its name.

        Raises:
            ConfigError: two of them, or one of them and the router, have the same name; or one moves what is no number.
        """
        self.at_start = self.dynmoe
        width = self.config.hidden_size
        self.controllers = [kind(self.dynmoe, self.columns, width) for kind in self.dynmoe.controllers]
        self._names: list[tuple[list[str], list[str]]] = []
        start: list[Any] = []
        for number, controller in enumerate(self.controllers):
            state, counts = controller.state(), controller.counts()
            _check(controller, state, self.dynmoe)
            start += [state[name] for name in (*controller.sets, *controller.reads)]
            for name, value in state.items():
                if hasattr(self, name):
                    raise ConfigError(
                        f"{_name(controller)} has a state {name!r}, {self._owner(name, number)}; rename it."
                    )
                self.register_buffer(name, as_tensor(value).to(self.weight.device))
            for name, value in counts.items():
                self.register_buffer(f"counts{number}_{name}", value.to(self.weight.device), persistent=False)
            self._names.append((list(state), list(counts)))
        self.host: list[dict[str, Any]] = []
        if self.controllers:
            self.register_load_state_dict_post_hook(_refresh)
        # As float32, which is what a checkpoint has; not from the buffers, which may be on a device without values.
        self.take([_as_float32(n) for value in start for n in (value if isinstance(value, list) else [value])])

    def _owner(self, name: str, before: int) -> str:
        owners = [c for c, (state, _) in zip(self.controllers[:before], self._names, strict=True) if name in state]
        return f"which {_name(owners[0])} has too" if owners else "a name that the router has already"

    def state(self, number: int) -> dict[str, Tensor]:
        """What controller ``number`` has in a checkpoint."""
        return {name: getattr(self, name) for name in self._names[number][0]}

    def counts(self, number: int) -> dict[str, Tensor]:
        """What controller ``number`` has counted on this rank since the last step."""
        return {name: getattr(self, f"counts{number}_{name}") for name in self._names[number][1]}

    def hosted(self) -> list[Tensor]:
        """What the host must know of the states, float64, to be copied and given to :meth:`take`."""
        return [state[name].detach().double().flatten() for _, _, name, state in self._hosted()]

    def _hosted(self) -> Iterator[tuple[int, Controller, str, dict[str, Tensor]]]:
        for number, controller in enumerate(self.controllers):
            state = self.state(number)
            yield from ((number, controller, name, state) for name in (*controller.sets, *controller.reads))

    def take(self, values: list[float]) -> None:
        """Route with the settings as they stand from now on."""
        self.host, moved, at = [{} for _ in self.controllers], {}, 0
        for number, controller, name, state in self._hosted():
            tensor = state[name]
            own, at = values[at : at + tensor.numel()], at + tensor.numel()
            numbers = own if tensor.is_floating_point() else [int(value) for value in own]
            self.host[number][name] = numbers if tensor.dim() else numbers[0]
            if name in controller.sets:
                moved[name] = self.host[number][name]
        self.dynmoe = self.at_start.moved(moved)

    def refresh(self) -> None:
        """Tell the host what the buffers say, after they have been written from outside; it waits for the device."""
        parts = self.hosted()
        self.take(torch.cat(parts).tolist() if parts else [])

    @property
    def active_E(self) -> Tensor | None:
        """bool, the experts there are to choose from; ``None``: all."""
        masks = [c.active(self.state(number)) for number, c in enumerate(self.controllers)]
        masks = [mask for mask in masks if mask is not None]
        return torch.stack(masks).all(dim=0) if len(masks) > 1 else masks[0] if masks else None

    @torch.no_grad()
    def record(self, x_TD: Tensor, routing: Routing, valid_T: Tensor | None) -> None:
        """Tell the controllers of training tokens; called once for each.

        Args:
            x_TD: the router's input.
            routing: of these tokens.
            valid_T: bool, False for padding; ``None``: all are valid.
        """
        watching = [n for n, c in enumerate(self.controllers) if self._names[n][1] and c.observes(self.host[n])]
        if not watching:
            return
        routing = routing if valid_T is None else routing.select(valid_T)
        valid_T = routing.map_TC.new_ones(len(routing.map_TC)) if valid_T is None else valid_T
        for number in watching:
            seen = Seen(x_TD.detach(), routing, valid_T, self.state(number), self.host[number])
            self.controllers[number].observe(self.counts(number), seen)

    def forget_counts(self) -> None:
        """Drop what was counted since the last step."""
        for number in range(len(self.controllers)):
            for value in self.counts(number).values():
                value.zero_()

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        """States and counts follow a move to another device, but keep their dtype in a model of another one."""
        mine = [t for n in range(len(self.controllers)) for t in (*self.state(n).values(), *self.counts(n).values())]
        kept = {id(tensor) for tensor in mine}

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in kept and moved.dtype != tensor.dtype else moved

        return super()._apply(keep, recurse)


def _refresh(router: ControlledRouter, _: Any) -> None:
    router.refresh()


def _name(controller: Controller) -> str:
    return f"the controller {type(controller).__name__}"


def as_tensor(value: Tensor | float | list[int]) -> Tensor:
    """A state: a tensor as it is, a float as float32, integers as int64."""
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float32 if isinstance(value, float) else torch.int64)


def _as_float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0] if isinstance(value, float) else value


def _check(controller: Controller, state: dict[str, Any], dynmoe: DynMoEConfig) -> None:
    settings = [field.name for field in own_fields(type(dynmoe))]
    settings += [name for part in dynmoe.settings for name in vars(part)]
    for name in controller.sets:
        if name not in settings:
            known = ", ".join(settings)
            raise ConfigError(f"{_name(controller)} sets {name!r}; accepted: a setting of its router, {known}.")
        if not isinstance(state.get(name), float):
            raise ConfigError(f"{_name(controller)} sets {name!r}; accepted: with a float of that name in its state.")
    for name in controller.reads:
        if isinstance(state.get(name), Tensor | None):
            raise ConfigError(f"{_name(controller)} reads {name!r}; accepted: numbers of that name in its state.")
