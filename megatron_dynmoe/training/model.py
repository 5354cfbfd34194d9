"""The model as Megatron's GPT builder builds it, with its MoE layers dynamic: the decoder's and those of multi-token
prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, ClassVar

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.training.models import gpt
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig, default_layer_spec

from megatron_dynmoe.config import ConfigError, DynMoEConfig
from megatron_dynmoe.mcore.layer import DynMoELayer
from megatron_dynmoe.mcore.norm import replace_norms
from megatron_dynmoe.mcore.specs import dynamic_layer_spec, dynamic_mtp_spec


@dataclass(kw_only=True)
class DynamicGPTModelConfig(GPTModelConfig):
    """Megatron's configuration of a GPT model.

    Attributes:
        dynmoe: what its MoE layers are built with.
        fused_norm: how the checkpoint that is loaded names the norms before experts; see
            :func:`megatron_dynmoe.mcore.specs.dynamic_layer_spec`.
    """

    builder: ClassVar[str] = "megatron_dynmoe.training.model.DynamicGPTModelBuilder"
    dynmoe: DynMoEConfig | None = None
    fused_norm: bool | None = None


class DynamicGPTModelBuilder(GPTModelBuilder):
    """Megatron's builder with dynamic layers also for multi-token prediction.

    megatron builds those from a spec of its own (training/models/gpt.py:285), which a model configuration cannot name.
    """

    def build_model(self, *args: Any, **kwargs: Any) -> GPTModel:
        """One stage of the model; see :meth:`GPTModelBuilder.build_model`.

        Raises:
            ConfigError: megatron built a layer of multi-token prediction that is not dynamic.
        """
        dynmoe, fused = self._model_config.dynmoe, self._model_config.fused_norm
        # The same method, with another function under the name that it calls: upstream's own module stays as it is.
        build = GPTModelBuilder.build_model
        names = vars(gpt) | {"mtp_block_spec": partial(mtp_block_spec, dynmoe=dynmoe, fused_norm=fused)}
        model = FunctionType(build.__code__, names, build.__name__, build.__defaults__)(self, *args, **kwargs)
        if dynmoe is not None:
            for name, layer in model.named_modules():
                if isinstance(layer, MoELayer) and not isinstance(layer, DynMoELayer):
                    raise ConfigError(f"{name} is a {type(layer).__name__}; every MoE layer must be a DynMoELayer.")
        return model


def layer_spec(config: GPTModelConfig, vp_stage: int | None = None, *, dynmoe: DynMoEConfig) -> Any:
    """Megatron's own choice of layer spec for ``config``, with its MoE layers made dynamic; dense models stay dense."""
    spec = default_layer_spec(config, vp_stage)
    if config.num_moe_experts is None:
        return replace_norms(spec)
    return dynamic_layer_spec(spec, dynmoe, fused_norm=getattr(config, "fused_norm", None))


def mtp_block_spec(
    config: GPTModelConfig,
    _: Any,
    vp_stage: int | None = None,
    *,
    dynmoe: DynMoEConfig | None,
    fused_norm: bool | None = None,
) -> Any:
    """Megatron's spec of this stage's multi-token prediction, or ``None``; layers are as the decoder's last one.

    megatron takes the decoder's last layer where the stage has decoder layers, and an MoE layer where it has none; here
    it is the last layer everywhere, so that a checkpoint fits every layout.
    """
    spec = gpt.mtp_block_spec(config, None, vp_stage=vp_stage)
    return None if spec is None else dynamic_mtp_spec(spec, dynmoe, fused_norm=fused_norm)
