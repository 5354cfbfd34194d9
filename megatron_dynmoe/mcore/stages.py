"""The width of what crosses from one pipeline stage to the next when logits travel beside the hidden states.

megatron-core's schedules take the width of the tensors between stages from the model's configuration, ``hidden_size``
(schedules.py:1157, 2116).  With ``variable_seq_lengths`` stages tell each other the shape before each tensor instead,
and wait for the device each time (p2p_communication.py:263).  Logits take the same channels in every micro-batch.  So
the schedule, and nobody else, is shown the configuration with the width that crosses.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.mcore.channels import channels_of


def width_between_stages(config: TransformerConfig, dynmoe: DynMoEConfig) -> int | None:
    """Channels of the tensor that crosses, with a gating residual; ``None`` where not every crossing is that wide.

    That is so where a stage ends before the first MoE layer, or holds none of the decoder's layers: embeddings, the
    loss or multi-token prediction alone.  Interleaved schedules know one width for all crossings.
    """
    layers = _layers_by_chunk(config)
    frequency = config.moe_layer_freq
    first = [*frequency, 1].index(1) if isinstance(frequency, list) else 0
    if config.mtp_standalone or 0 in layers or first >= layers[0]:
        return None
    columns = (config.num_moe_experts or 0) + dynmoe.zero_computation_experts
    return config.hidden_size + channels_of(columns, config.params_dtype)


def _layers_by_chunk(config: TransformerConfig) -> list[int]:
    """Layers of the decoder in each chunk of the model, the first stage's first chunk first."""
    if config.pipeline_model_parallel_layout is not None:
        layout = config.pipeline_model_parallel_layout.layout
        return [chunk.count(LayerType.decoder) for chunks in layout for chunk in chunks]
    chunks = config.virtual_pipeline_model_parallel_size
    stages = range(config.pipeline_model_parallel_size)
    numbers = range(chunks) if chunks else [None]
    return [get_num_layers_to_build(config, number, stage) for stage in stages for number in numbers]


def fix_width(chunks: list[Any], *, dynmoe: DynMoEConfig) -> list[Any]:
    """Let the schedule expect :func:`width_between_stages` rather than ask for shapes, if every crossing has it.

    Args:
        chunks: this stage's model, as megatron wraps it for training; without a wrapper it keeps exchanging shapes,
            because a model reads its own ``hidden_size``.
        dynmoe: what the model was built with.
    """
    for chunk in chunks:
        width = width_between_stages(chunk.config, dynmoe) if hasattr(chunk, "module") else None
        if width is not None:
            chunk.config = seen_by_schedule(chunk.config, width)
    return chunks


def seen_by_schedule(config: TransformerConfig, width: int) -> TransformerConfig:
    """``config`` with another width and no exchange of shapes; every other field is the same one, to read and to write:
    training sets hooks on the configuration that it gets here.
    """
    fixed = {"hidden_size": property(lambda _: width), "variable_seq_lengths": property(lambda _: False)}
    seen: Any = object.__new__(type("ScheduleConfig", (type(config),), fixed))
    seen.__dict__ = config.__dict__
    return seen
