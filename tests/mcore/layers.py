"""Layers of megatron-core and of ours at toy sizes, for the tests of several rooms."""

import torch

S, B, D, F, E = 6, 2, 16, 24, 4
CAPTURED = {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": ["attn", "moe_router"]}
FREE = {"zero_experts": 1, "copy_experts": 1, "constant_experts": 2}


def set_up():
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    model_parallel_cuda_manual_seed(1)


def layer_config(**extra):
    import torch.nn.functional as F_
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        **{
            "num_layers": 1,
            "hidden_size": D,
            "num_attention_heads": 2,
            "num_moe_experts": E,
            "moe_ffn_hidden_size": F,
            "ffn_hidden_size": F,
            "moe_token_dispatcher_type": "alltoall",
            "add_bias_linear": False,
            "gated_linear_unit": True,
            "activation_func": F_.silu,
            "bias_activation_fusion": False,
            "moe_router_pre_softmax": True,
            "normalization": "RMSNorm",
            "params_dtype": torch.float32,
        }
        | extra
    )


def stock_spec(config):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization="RMSNorm")


def layer_of(config, dynmoe):
    from megatron_dynmoe.mcore.specs import dynamic_layer_spec

    spec = dynamic_layer_spec(stock_spec(config), dynmoe)
    layer = spec.submodules.mlp(config=config, layer_number=1)
    layer.set_layer_number(1)
    return layer


def plans_of(layer):
    """The plans of the layer's passes from now on."""
    plans, dispatcher = [], layer.token_dispatcher
    send = dispatcher.send

    def seen(*args, **kwargs):
        sent = send(*args, **kwargs)
        plans.append(sent.way.transport.plan)
        return sent

    dispatcher.send = seen
    return plans


def filled(layer):
    """Weights large enough that tokens differ, the same on every rank (experts: by their number in the model)."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(layer.named_parameters()):
            if ".weight1" in name or ".weight2" in name:
                whole = torch.randn(E, *parameter.shape[1:], generator=generator) * 0.3
                parameter.copy_(whole[layer.local_expert_indices])
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return layer
