"""What the flex dispatcher refuses, each in one sentence; run in a rank by tests/mcore/test_flex.py."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests import deep_ep_standin
from tests.flex_ranks import BACKENDS, EP2, flex, setup
from tests.mcore.layers import layer_config, layer_of

HALF = {"params_dtype": torch.bfloat16, "bf16": True, **EP2}
DEEPEP, HYBRIDEP = map(flex, BACKENDS)
NODES9 = {"num_moe_experts": 144, "expert_model_parallel_size": 72}
# (configuration, the layer's own, words of the sentence in their order; None: accepted, but for the missing library)
REFUSED = [
    ({"moe_flex_dispatcher_backend": "hybridep"}, {}, "-backend is 'hybridep',.*-dispatcher-type flex, or leave"),
    ({"moe_flex_dispatcher_num_sms": 24}, {}, "--moe-flex-dispatcher-num-sms is 24,.*or leave it out"),
    ({"moe_permute_fusion_into_hybridep": True}, {}, "-into-hybridep is True,.*-backend hybridep"),
    (DEEPEP | {"moe_hybridep_pad_uneven_dispatch_inputs": True}, {}, "-pad-uneven-dispatch-inputs is True,.* hybridep"),
    (DEEPEP | {"moe_hybridep_num_sms_preprocessing": 64}, {}, "-preprocessing is 64,"),
    (DEEPEP, {"dispatch_unit": "expert"}, "--moe-dispatch-unit is 'expert',.*alltoall"),
    ({"moe_token_dispatcher_type": "allgather"}, {"dispatch_unit": "rank"}, "--moe-dispatch-unit is 'rank',"),
    (DEEPEP | {"expert_model_parallel_size": 1}, {}, "--expert-model-parallel-size is 1,.* at least 2"),
    (DEEPEP | EP2, {}, "--bf16 is False,.*torch.float32; set --bf16"),
    (HYBRIDEP | EP2, {}, "--bf16 is False,"),
    (DEEPEP | HALF | {"hidden_size": 24}, {}, "--hidden-size is 24,.*multiple of 16"),
    (HYBRIDEP | HALF | {"hidden_size": 24}, {}, "--hidden-size is 24,.*multiple of 16"),
    (DEEPEP | HALF | {"moe_flex_dispatcher_num_sms": 21}, {}, "--moe-flex-dispatcher-num-sms is 21,.*even"),
    (DEEPEP | HALF | {"num_moe_experts": 64}, {}, "--moe-max-experts-per-token is None,.* 64 could be.*1 to 32"),
    (DEEPEP | HALF | {"num_moe_experts": 64}, {"max_experts_per_token": 33}, "-per-token is 33,.*1 to 32"),
    (DEEPEP | HALF | {"num_moe_experts": 64}, {"max_experts_per_token": 32}, None),
    (DEEPEP | HALF | {"num_moe_experts": 64}, {"rule": "top-k", "topk": 8}, None),
    (DEEPEP | HALF | {"num_moe_experts": 32}, {}, None),
    (DEEPEP | HALF | {"num_moe_experts": 32, "expert_tensor_parallel_size": 2}, {}, "1 to 16"),
    (DEEPEP | HALF | NODES9, {"max_experts_per_token": 9}, "-per-token is 9,.*1 to 8, or an --expert-model-parallel"),
    (DEEPEP | HALF | NODES9, {"max_experts_per_token": 8}, None),
    (HYBRIDEP | HALF | {"num_moe_experts": 64}, {}, None),
]


def check_refusals() -> None:
    """One sentence each; what is accepted is refused here for the library alone, which is named."""
    from megatron_dynmoe.config import ConfigError, DynMoEConfig
    from megatron_dynmoe.mcore.checks import check_config

    for theirs, ours, said in REFUSED:
        with pytest.raises(ConfigError) as refusal:
            check_config(layer_config(**theirs), DynMoEConfig(**ours))
        message = str(refusal.value)
        library = "install the branch hybrid-ep" if HYBRIDEP.items() <= theirs.items() else "install DeepEP 1.2.1"
        assert re.search(said or f"is not installed; .*{re.escape(library)}", message), (theirs, message)
        assert "\n" not in message and message.count(". ") == 0, message
    # megatron-core lets these pass with Transformer Engine's fuser, or with a data loader of its own only
    for name, value, said in (
        ("moe_expert_rank_capacity_factor", 1.5, "--moe-expert-rank-capacity-factor is 1.5,.*dropless"),
        ("hybrid_context_parallel", True, "--hybrid-context-parallel is True,.*pad-uneven"),
    ):
        config = layer_config(**HYBRIDEP | HALF)
        setattr(config, name, value)
        with pytest.raises(ConfigError, match=said):
            check_config(config, DynMoEConfig())
    config.moe_hybridep_pad_uneven_dispatch_inputs = True
    with pytest.raises(ConfigError, match="is not installed"):
        check_config(config, DynMoEConfig())


def check_wrong_library() -> None:
    """A deep_ep that does not import, or is of another kind, is told apart from none; so are numbers of ranks."""
    from megatron_dynmoe.config import ConfigError, DynMoEConfig
    from megatron_dynmoe.mcore.checks import check_config

    config = layer_config(**DEEPEP | HALF)
    sys.modules["deep_ep"] = ModuleType("deep_ep")
    with pytest.raises(ConfigError, match=r"has not what megatron-core needs of DeepEP \(fused_a2a.py\)"):
        check_config(config, DynMoEConfig())
    del sys.modules["deep_ep"]
    Path("broken").mkdir()
    Path("broken/deep_ep.py").write_text("import a_library_of_cuda\n")
    sys.path.insert(0, "broken")
    with pytest.raises(ConfigError, match=r"does not import \(No module named 'a_library_of_cuda'\)"):
        check_config(config, DynMoEConfig())
    setup()
    deep_ep_standin.TUNED = (4,)
    with pytest.raises(ConfigError, match=r"--expert-model-parallel-size is 2,.*Unsupported number of EP ranks: 2"):
        layer_of(layer_config(**EP2, **DEEPEP), DynMoEConfig())
