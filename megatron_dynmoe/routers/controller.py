"""What moves between steps: state that is saved, counts that are taken, and what follows from them.

A controller belongs to one router.  The router keeps its tensors, so that they move, save and resume with it; the
controller itself has none.  It is told of each training token once, also under recompute and gradient accumulation.
After the optimizer's step its counts are summed over all ranks that hold the router, and it changes its state there,
the same on every rank.  Where the optimizer skipped the step the counts are dropped and nothing changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from megatron_dynmoe.routers.router_config import RouterConfig
    from megatron_dynmoe.routers.routing import Routing

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Step:
    """The optimizer's step that was taken.

    Attributes:
        iteration: training iterations done, this one included.
        layer: index of the router's layer, from 0.
        weight_CD: the router's weight, whole on every rank; read only.
        experts: what can be done to the layer's experts; see :class:`megatron_dynmoe.mcore.slots`. ``None`` in tests.
    """

    iteration: int
    layer: int
    weight_CD: Tensor
    experts: Any = None


class Controller:
    """Base class; a method names its subclass when it registers: ``register_rule(..., controller=Mine)``.

    Args:
        config: of the router.
        columns: C of the router.
        width: D.

    Attributes:
        sets: names of settings that it moves. ``state`` has a float32 scalar under each of these names; routing,
            losses and the export read it in the place of the setting.
    """

    sets: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: RouterConfig, columns: int, width: int) -> None:
        self.config, self.columns, self.width = config, columns, width

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by name, as it is at the start; the same on every rank that holds the router."""
        return {}

    def counts(self) -> dict[str, Tensor]:
        """What :meth:`observe` adds up, by name, as zeros; not saved, summed over ranks after each step."""
        return {}

    def active(self, state: State) -> Tensor | None:
        """bool [E], the experts that there are to choose from; ``None``: all."""
        return None

    def observe(self, counts: State, x_TD: Tensor, routing: Routing, valid_T: Tensor | None) -> None:
        """Add one micro-batch to ``counts``, in place, without waiting for the device.

        Args:
            counts: as :meth:`counts` gives them.
            x_TD: the router's input.
            routing: of these tokens, no gradient.
            valid_T: bool, False for padding; ``None``: all are valid.
        """

    def after_step(self, state: State, totals: State, step: Step) -> None:
        """Change ``state`` in place.

        Args:
            state: as :meth:`state` gives it.
            totals: the counts of this step, summed over all ranks.
            step: what was taken.
        """

    def report(self, state: State) -> dict[str, float]:
        """Numbers of this layer for the log; means over layers are logged under these names."""
        return {name: float(state[name]) for name in self.sets}
