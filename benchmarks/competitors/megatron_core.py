"""megatron-core's own all-to-all path: its stock dispatcher, with our grouped experts or its SequentialMLP.

The stock dispatcher sizes its buffers as T * topk. A map with exactly that many entries passes through it unharmed
whatever the lengths of its rows, so it is given the very map of the other methods; without that, it must not run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.competitors.case import Case, Setting
from benchmarks.competitors.method import Method, NotPossible, StackedMethod, Wire, leaf
from megatron_dynmoe import host
from megatron_dynmoe.experts import grouped_mlp

# megatron says several times which optional packages it does without.
warnings.filterwarnings("ignore", module="megatron")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    host.enable()  # before megatron asks for CUDA; does nothing where CUDA is
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
    from megatron.core.transformer.transformer_config import TransformerConfig


class StockDispatcher(StackedMethod):
    """Stock dispatch and combine; the experts are the grouped GEMMs that ours and the floor use."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.dispatcher = stock_dispatcher(case)

    def forward(self) -> Tensor:
        return through(self.dispatcher, self, self._experts)

    def _experts(self, rows_ND: Tensor, rows_L: Tensor, weights_N: Tensor) -> Tensor:
        return grouped_mlp(rows_ND, weights_N, *self.parameters, rows_L)

    def wire(self) -> Wire:
        return sent(self.dispatcher, self.case)


class StockLayer(Method):
    """Stock experts as well: SequentialMLP, which is what megatron-core has without Transformer Engine."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.dispatcher = stock_dispatcher(case)
        self.mlp = sequential_mlp(case)
        for expert, fc1, fc2 in zip(self.mlp.local_experts, case.fc1_LGD, case.fc2_LDF, strict=True):
            expert.linear_fc1.weight = torch.nn.Parameter(leaf(fc1))
            expert.linear_fc2.weight = torch.nn.Parameter(leaf(fc2))
        self.parameters = list(self.mlp.parameters())

    def forward(self) -> Tensor:
        return through(self.dispatcher, self, lambda *arguments: self.mlp(*arguments)[0])

    def expert_grads(self) -> tuple[Tensor, Tensor]:
        experts = self.mlp.local_experts
        fc1, fc2 = ([getattr(e, name).weight.grad for e in experts] for name in ("linear_fc1", "linear_fc2"))
        return torch.stack(fc1), torch.stack(fc2)

    def wire(self) -> Wire:
        return sent(self.dispatcher, self.case)


def through(dispatcher: MoEAlltoAllTokenDispatcher, method: Method, experts: Callable[..., Tensor]) -> Tensor:
    """The order in which megatron-core's MoELayer calls its dispatcher."""
    rows, weights = dispatcher.dispatch_preprocess(method.x_TD, method.case.map_TE, method.weights_TE)
    rows, weights = dispatcher.token_dispatch(rows, weights)
    out = experts(*dispatcher.dispatch_postprocess(rows, weights))
    return dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(out)))


def sent(dispatcher: MoEAlltoAllTokenDispatcher, case: Case) -> Wire:
    """From the dispatcher's splits, which it makes for more than one rank."""
    splits = [case.setting.rows] if case.setting.ep == 1 else [int(rows) for rows in dispatcher.input_splits]
    return Wire.of(case, splits, weights_per_row=1)


def stock_dispatcher(case: Case) -> MoEAlltoAllTokenDispatcher:
    """megatron-core's dispatcher for this rank."""
    local = case.fc1_LGD.shape[0]
    return MoEAlltoAllTokenDispatcher(
        local, list(range(case.rank * local, (case.rank + 1) * local)), _config(case.setting), _groups(case)
    )


def sequential_mlp(case: Case) -> torch.nn.Module:
    """megatron-core's SequentialMLP, as its local layer spec builds it."""
    config = _config(case.setting)
    spec = get_gpt_layer_local_spec(num_experts=case.setting.experts, normalization="RMSNorm")
    experts = spec.submodules.mlp.keywords["submodules"].experts
    return experts(case.fc1_LGD.shape[0], config, pg_collection=_groups(case))


def _groups(case: Case) -> ProcessGroupCollection:
    return ProcessGroupCollection(ep=case.group, tp_ep=case.group, expt_tp=case.alone, expt_dp=case.alone)


def _config(setting: Setting) -> TransformerConfig:
    if setting.rows != setting.tokens * int(setting.mean_k):
        raise NotPossible(
            f"megatron-core's dispatcher needs a whole number of experts per token, not {setting.mean_k}."
        )
    return TransformerConfig(
        num_layers=1,
        hidden_size=setting.width,
        num_attention_heads=1,
        num_moe_experts=setting.experts,
        ffn_hidden_size=setting.expert_width,
        moe_ffn_hidden_size=setting.expert_width,
        moe_router_topk=int(setting.mean_k),
        moe_router_pre_softmax=True,
        moe_token_dispatcher_type="alltoall",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=torch.cuda.is_available(),
        add_bias_linear=False,
        normalization="RMSNorm",
        params_dtype=setting.dtype,
        bf16=setting.dtype == torch.bfloat16,
        perform_initialization=False,
    )
