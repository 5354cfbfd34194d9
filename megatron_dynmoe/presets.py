"""Settings of published systems, as fields of :class:`megatron_dynmoe.config.DynMoEConfig`."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Huang et al. 2024, arXiv 2403.07652: p = 0.4, alpha = 1e-2, beta = 1e-4, raw probabilities as weights.
    "dynamic-moe": {"rule": "top-p", "top_p": 0.4, "load_balance_coeff": 1e-2, "entropy_coeff": 1e-4},
    # Fedus et al. 2021, arXiv 2101.03961: one expert, weighted by its probability; alpha = 1e-2.
    "switch": {"rule": "top-k", "topk": 1, "load_balance_coeff": 1e-2},
    # Lepikhin et al. 2020, arXiv 2006.16668: two experts, weights normalised over the pair.
    "gshard": {"rule": "top-k", "topk": 2, "normalize_weights": True, "load_balance_coeff": 1e-2},
    # Guo et al. 2024, arXiv 2405.14297: top-any gating, both losses at 1e-2; scale and schedule are those of the public
    # code's DeepSpeed layer (scale 1, not trained; record from 300, update at 600, period 900).
    "dynmoe": {
        "gate": "cosine",
        "rule": "top-any",
        "diversity_coeff": 1e-2,
        "simplicity_coeff": 1e-2,
        "adaptive_experts": True,
    },
    # Jin et al. 2024, arXiv 2410.07348: top-2 over FFN and zero-computation experts, beta = 1e-2, tau = 0.75; the
    # number of constant experts goes with that of FFN experts: 2 beside 8 and 16, 6 beside 32.
    "moe-plus-plus": {
        "rule": "top-k",
        "topk": 2,
        "zero_experts": 1,
        "copy_experts": 1,
        "constant_experts": 2,
        "gating_residual": True,
        "tau": 0.75,
        "load_balance_coeff": 1e-2,
    },
    # What the published 7B weights were made with, where the code differs from the paper: two-layer gate, the zero
    # expert's weight given to its partner, experts that see twice their input; no balance loss is in that code.
    "moe-plus-plus-released": {
        "gate": "tanh",
        "rule": "top-k",
        "topk": 2,
        "zero_experts": 1,
        "copy_experts": 1,
        "constant_experts": 2,
        "gating_residual": True,
        "drop_zero_weight": True,
        "expert_input_scale": 2.0,
    },
}
