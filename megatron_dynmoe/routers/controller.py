"""What moves between steps: state that is saved, counts that are taken, and what follows from them.

A controller belongs to one router.  The router keeps its tensors, so that they move, save and resume with it; the
controller itself has none.  It is told of each training token once, also under recompute, gradient accumulation and
where Megatron runs a step a second time; of padding and of evaluation it is not told.  After the optimizer's step its
counts are summed over all ranks that hold the router, and it changes its state there, the same on every rank.  Where
the optimizer skipped the step the counts are dropped and nothing changes.

Nothing waits for the device in a pass.  What must be known on the host there (``sets``, ``reads``) is copied once a
step, for all layers together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from megatron_dynmoe.routers.router_config import RouterConfig
    from megatron_dynmoe.routers.routing import Routing

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Seen:
    """One micro-batch of training tokens on this rank; no gradients.

    Attributes:
        x_TD: the router's input.
        routing: of these tokens; padding chooses nobody.
        valid_T: bool, False for padding.
        state: the controller's, to be read.
        host: what ``sets`` and ``reads`` name, as numbers; a list for a vector.
    """

    x_TD: Tensor
    routing: Routing
    valid_T: Tensor
    state: State
    host: Mapping[str, Any]


class Experts(Protocol):
    """What a controller can do to its layer: :class:`megatron_dynmoe.mcore.slots.LayerExperts`."""

    def parameter(self, name: str) -> Tensor:
        """What the router learns under ``name``, whole and as it stands; read only.  Every rank calls it."""

    def write(self, name: str, slot: int, value: Tensor) -> None:
        """Set a row of it, the same on every rank; what the optimizer keeps for the row starts again."""

    def fresh(self, slot: int, number: int) -> None:
        """Draw an expert's weights anew; the same ``number``, the same weights.  Every rank calls it."""

    def copy(self, slot: int, source: int) -> None:
        """Give an expert the weights of another.  Every rank calls it."""


@dataclass(frozen=True)
class Step:
    """The optimizer's step that was taken.

    Attributes:
        iteration: training iterations done, this one included.
        layer: index of the router's layer, from 0.
        host: as in :class:`Seen`, before the step.
        experts: of the layer.
    """

    iteration: int
    layer: int
    host: Mapping[str, Any]
    experts: Experts


class Controller:
    """Base class; a method names its subclass when it registers: ``register_rule(..., controller=Mine)``.

    Args:
        config: of the router, with the settings as they are at the start.
        columns: C of the router.
        width: D.

    Attributes:
        sets: names of settings that it moves. ``state`` has a float under each of these names; routing, losses and the
            export read it in the place of the setting.
        reads: names of further states that it needs on the host.
        events: field of the metrics file for what :meth:`after_step` returns.
        flag: that asks for it, where the method can do without.
        writes: it changes weights (:class:`Experts`), so the optimizer's state must be within reach.
    """

    sets: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...]] = ()
    events: ClassVar[str] = ""
    flag: ClassVar[str] = ""
    writes: ClassVar[bool] = False

    def __init__(self, config: RouterConfig, columns: int, width: int) -> None:
        self.config, self.columns, self.width = config, columns, width

    @classmethod
    def wanted(cls, config: RouterConfig) -> bool:
        """Whether a router of this configuration has it."""
        return True

    def state(self) -> dict[str, Tensor | float | list[int]]:
        """What a checkpoint holds, by name, as it is at the start; the same on every rank that holds the router.

        A float becomes a float32 scalar and integers become int64.  What ``sets`` names is a float, what ``reads``
        names a float or a list of integers: the host has it before there is a device.
        """
        return {}

    def counts(self) -> dict[str, Tensor]:
        """What :meth:`observe` adds up, by name, as zeros of int64 or float32; not saved."""
        return {}

    def active(self, state: State) -> Tensor | None:
        """bool [C], the experts that there are to choose from; ``None``: all."""
        return None

    def observes(self, host: Mapping[str, Any]) -> bool:
        """Whether this step's tokens are to be counted; the same on every rank."""
        return True

    def observe(self, counts: State, seen: Seen) -> None:
        """Add one micro-batch to ``counts``, in place, without waiting for the device."""

    def after_step(self, state: State, totals: State, step: Step) -> Any:
        """Change ``state`` in place.

        Args:
            state: as :meth:`state` gives it.
            totals: the counts of this step, summed over all ranks; each token counts once.
            step: what was taken.

        Returns:
            a dataclass to be printed and written to the metrics file, or ``None``.
        """

    def report(self, state: State) -> dict[str, Tensor]:
        """Numbers of this layer for the log: means of a scalar over layers are logged, vectors by layer alone."""
        return {name: state[name] for name in self.sets}
