"""The torch experts in FP8: the same weights and checkpoints, other GEMMs, and the scales of the delayed recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dynmoe.experts.fp8 import Fp8Recipe
from megatron_dynmoe.experts.fp8_delayed import DelayedScales
from megatron_dynmoe.experts.fp8_linear import Fp8Linear
from megatron_dynmoe.experts.grouped import GroupedLinear
from megatron_dynmoe.mcore.experts import TorchGroupedMLP


class Fp8GroupedMLP(TorchGroupedMLP):
    """All local experts in two grouped GEMMs in FP8; the activation between them stays in the model's dtype.

    On a CPU, and on a GPU if ``emulate``, operands are cast to float8 and back; else torch's kernel is used
    (:mod:`megatron_dynmoe.experts.fp8_rowwise`).  Call :func:`~megatron_dynmoe.mcore.fp8_state.update_scales` after
    each step; the training entry does.

    In a checkpoint the scales of the delayed recipe stand in each expert's ``_extra_state``, where Transformer Engine
    keeps its own.  Neither reads the other's: scales then start at 1, as with a checkpoint without FP8.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
        *,
        recipe: Fp8Recipe,
        emulate: bool,
    ) -> None:
        super().__init__(num_local_experts, config, pg_collection, name)
        emulate = emulate or not torch.cuda.is_available()
        self.fc1, self.fc2 = (Fp8Linear(num_local_experts, recipe, emulate=emulate) for _ in range(2))
        self.to(self.weight1.device)
        self.full_precision = False

    def set_layer(self, number: int, *, mtp: bool) -> None:
        """Keep the model's dtype in the first and last layers if ``--first-last-layers-bf16`` says so.

        Args:
            number: of the layer, from 1.
            mtp: whether the layer is one of multi-token prediction, which count as neither (as in megatron-core,
                multi_token_prediction.py:1182).
        """
        self.full_precision = not mtp and is_first_last_bf16_layer(self.config, number - 1)

    @property
    def linears(self) -> tuple[GroupedLinear, GroupedLinear] | None:
        """What multiplies."""
        return super().linears if self.full_precision else (self.fc1, self.fc2)

    @property
    def scales(self) -> dict[str, DelayedScales]:
        """Of both layers, by the name of megatron-core's linear layer; empty but for the delayed recipe."""
        found = {"linear_fc1": self.fc1.scales, "linear_fc2": self.fc2.scales}
        return {name: scales for name, scales in found.items() if scales is not None}

    def expert_state(self, linear: str, index: int) -> dict[str, Tensor] | None:
        """What is saved of an expert beside its weights."""
        return self.scales[linear].of_expert(index) if self.scales else None

    def get_extra_state(self) -> Any:
        """The scales of all local experts, as :meth:`set_extra_state` takes them."""
        return {
            name: [s.of_expert(i) for i in range(self.num_local_experts)] for name, s in self.scales.items()
        } or None

    def set_extra_state(self, state: Any) -> None:
        """Takes the scales where there are any; what other experts keep (nothing, or bytes) is passed by."""
        for name, scales in self.scales.items():
            saved: Sequence[Any] = (state or {}).get(name, ())
            for index, expert in enumerate(saved):
                if is_ours(expert):
                    scales.load_expert(index, expert)


def is_ours(state: Any) -> bool:
    """Whether an expert's extra state holds the scales of these experts."""
    return isinstance(state, dict) and set(state) == {"scale", "amax_history"}
