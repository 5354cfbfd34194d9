"""FP8 experts in megatron's layer: what stays in full precision, checkpoints into other experts, what is refused."""

import torch

from megatron_dynmoe.config import ConfigError, DynMoEConfig
from tests import ranks
from tests.mcore.layers import B, D, S, layer_config, layer_of, set_up

FP8 = {"fp8_recipe": "delayed", "fp8_amax_history_len": 3}


def _update(layer):
    from megatron_dynmoe.mcore.fp8_state import update_scales

    layer.zero_grad()
    layer(torch.randn(S, B, D))[0].square().sum().backward()
    update_scales([layer])


def check_layer() -> None:
    """Everything around the experts keeps its bits; so do first and last layers, and tokens without an FFN expert."""
    from megatron_dynmoe.mcore.fp8_experts import Fp8GroupedMLP

    set_up()
    free = {"zero_experts": 2, "copy_experts": 2, "constant_experts": 2}
    config = layer_config(num_layers=6, first_last_layers_bf16=True, num_layers_at_end_in_bf16=2)
    plain, fp8 = (
        layer_of(config, DynMoEConfig(**free)),
        layer_of(config, DynMoEConfig(**free, fp8_recipe="tensorwise")),
    )
    assert type(fp8.experts) is Fp8GroupedMLP
    fp8.load_state_dict(plain.state_dict())
    x, maps = torch.randn(S, B, D), []
    for layer in (plain, fp8):
        layer.token_dispatcher.begin = lambda routing_map, begin=layer.token_dispatcher.begin: (
            maps.append(routing_map) or begin(routing_map)
        )
    for number in range(1, 7):
        maps.clear()
        plain.set_layer_number(number)
        fp8.set_layer_number(number)
        wanted, got = plain(x)[0].view(-1, D), fp8(x)[0].view(-1, D)
        assert torch.equal(*maps)
        if number in (1, 5, 6):
            assert torch.equal(got, wanted), number
            continue
        unvisited = ~maps[0].any(dim=-1)
        assert 0 < unvisited.sum() < len(unvisited)
        assert torch.equal(got[unvisited], wanted[unvisited])
        assert (got[~unvisited] != wanted[~unvisited]).any(dim=-1).all()
        assert (got - wanted).norm() < 0.1 * wanted.norm()  # e4m3 rounds by a sixteenth at most, two layers
    assert {p.dtype for p in fp8.parameters()} == {torch.float32}


def check_checkpoints() -> None:
    """Scales of the delayed recipe go with an FP8 layer's checkpoint, and are no obstacle to other experts."""
    import tempfile

    from megatron.core import dist_checkpointing

    set_up()
    kinds = {
        "fp8": DynMoEConfig(**FP8),
        "longer history": DynMoEConfig(fp8_recipe="delayed", fp8_amax_history_len=5),
        "tensorwise": DynMoEConfig(fp8_recipe="tensorwise"),
        "torch": DynMoEConfig(expert_backend="torch"),
        "sequential": DynMoEConfig(expert_backend="sequential"),
    }
    for saver in ("fp8", "torch", "sequential"):
        first = layer_of(layer_config(), kinds[saver])
        if saver == "fp8":
            _update(first)
            _update(first)
        with tempfile.TemporaryDirectory() as folder:
            dist_checkpointing.save(first.sharded_state_dict(prefix="mlp."), folder)
            for loader, dynmoe in kinds.items():
                second = layer_of(layer_config(), dynmoe)
                state = dist_checkpointing.load(second.sharded_state_dict(prefix="mlp."), folder)
                second.load_state_dict({key.removeprefix("mlp."): value for key, value in state.items()})
                weights = dist_checkpointing.load(first.sharded_state_dict(prefix="mlp."), folder)
                assert weights
                if loader == "fp8":
                    for name, scales in second.experts.scales.items():
                        if saver == "fp8":
                            assert torch.equal(scales.scale, first.experts.scales[name].scale)
                            assert torch.equal(scales.amax_history, first.experts.scales[name].amax_history)
                            assert (scales.scale != 1).any()
                        else:
                            assert scales.scale.eq(1).all() and scales.amax_history.eq(0).all()
                if saver == "fp8" and loader == "longer history":
                    for name, scales in second.experts.scales.items():
                        assert torch.equal(scales.amax_history[-2:], first.experts.scales[name].amax_history[-2:])
        for other in ("fp8", "torch"):  # and the state dict of one process, as torch.save writes it
            second = layer_of(layer_config(), kinds[other])
            if saver != "sequential":
                second.load_state_dict(first.state_dict())
                assert torch.equal(second.experts.weight1, first.experts.weight1)


def check_transformer_engine_is_told_of_nothing() -> None:
    """Its experts take bytes; a stand-in with their names sees an empty tensor where scales were, and bytes as ever."""
    from megatron_dynmoe.mcore.fp8_state import pass_by_scales

    set_up()
    layer = layer_of(layer_config(), DynMoEConfig(**FP8))
    seen = {}

    class Linear(torch.nn.Module):
        def _load_from_state_dict(self, state, prefix, *args):
            seen.update({key: value for key, value in state.items() if key.startswith(prefix)})

    experts = torch.nn.Module()
    experts.linear_fc1 = Linear()
    pass_by_scales(experts)
    bytes_of_theirs = torch.ones(3, dtype=torch.uint8)
    state = {"linear_fc1._extra_state": layer.experts.expert_state("linear_fc1", 0)}
    experts.load_state_dict(state | {"linear_fc1._extra_state1": bytes_of_theirs}, strict=False)
    assert seen["linear_fc1._extra_state"].numel() == 0
    assert seen["linear_fc1._extra_state1"] is bytes_of_theirs


def test_what_is_not_in_fp8_keeps_its_bits(tmp_path):
    ranks.call(check_layer, ranks=1, folder=tmp_path)


def test_a_checkpoint_moves_to_fp8_and_back(tmp_path):
    ranks.call(check_checkpoints, ranks=1, folder=tmp_path)


def test_transformer_engine_loads_a_checkpoint_with_scales(tmp_path):
    ranks.call(check_transformer_engine_is_told_of_nothing, ranks=1, folder=tmp_path)


# DynMoEConfig, the model's configuration, compute capability -> what the sentence says; None: accepted.
ON_A_GPU = [
    ({"fp8_recipe": "rowwise"}, {}, (9, 0), None),
    ({"fp8_recipe": "delayed", "fp8_emulate": True}, {"params_dtype": torch.float32}, (8, 0), None),
    ({"fp8_recipe": "none"}, {}, (7, 0), None),
    ({"fp8_recipe": "delayed"}, {}, (9, 0), "--fp8-recipe delayed and Transformer Engine"),
    ({"fp8_recipe": "blockwise"}, {}, (9, 0), "'rowwise' alone"),
    ({"fp8_recipe": "rowwise", "fp8_format": "hybrid"}, {}, (9, 0), "--moe-fp8-format is 'hybrid'"),
    ({"fp8_recipe": "rowwise"}, {}, (10, 0), "compute capability 9.0"),
    ({"fp8_recipe": "rowwise"}, {"params_dtype": torch.float32}, (9, 0), "add --bf16"),
    ({"fp8_recipe": "rowwise"}, {"moe_ffn_hidden_size": 24}, (9, 0), "--moe-ffn-hidden-size (a rank's share) is 24"),
    ({"fp8_recipe": "rowwise", "expert_backend": "te"}, {}, (9, 0), "--moe-expert-backend te"),
    ({"fp8_recipe": "rowwise"}, {"fp8": "hybrid"}, (9, 0), "--fp8-format has Transformer Engine"),
]


def check_refusals_on_a_gpu() -> None:
    """This machine claims to have one, of which nothing but the name is asked."""
    from types import SimpleNamespace
    from unittest import mock

    from megatron_dynmoe.mcore.fp8_checks import check_fp8
    from megatron_dynmoe.training.values import check_recipe

    usual = {"fp8": None, "fp4": None, "fp8_wgrad": True, "first_last_layers_bf16": False, "hidden_size": 64}
    usual |= {"params_dtype": torch.bfloat16, "moe_ffn_hidden_size": 32, "expert_tensor_parallel_size": 1}
    with mock.patch("torch.cuda.is_available", lambda: True):
        for dynmoe, extra, capability, said in ON_A_GPU:
            with mock.patch("torch.cuda.get_device_capability", lambda found=capability: found):
                try:
                    check_fp8(SimpleNamespace(**(usual | extra)), DynMoEConfig(**dynmoe))
                except ConfigError as error:
                    assert said is not None and said in str(error) and "\n" not in str(error), (said, error)
                else:
                    assert said is None, said
        for capability in ((9, 0), (10, 0)):
            with mock.patch("torch.cuda.get_device_capability", lambda found=capability: found):
                check_recipe(SimpleNamespace(fp8="e4m3", fp8_recipe="blockwise"))
                check_recipe(SimpleNamespace(fp8=None, fp8_recipe="mxfp8"))
                try:
                    check_recipe(SimpleNamespace(fp8="e4m3", fp8_recipe="mxfp8"))
                except ConfigError as error:
                    assert capability == (9, 0) and str(error).startswith("--fp8-recipe is 'mxfp8'")
                else:
                    assert capability == (10, 0)


def test_what_a_gpu_cannot_is_refused_in_a_sentence(tmp_path):
    ranks.call(check_refusals_on_a_gpu, ranks=1, folder=tmp_path)
