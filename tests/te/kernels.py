"""Bodies of test_stand_ins.py, for a rank: stand-ins against torch's autograd, or against Transformer Engine itself."""

import torch
import torch.nn.functional as F

EPS = 2**-22  # float32 sums of some tens of products, in two orders


def close(got: torch.Tensor, wanted: torch.Tensor, what: str, tolerance: float = EPS) -> None:
    torch.testing.assert_close(
        got.double(),
        wanted.double(),
        rtol=0,
        atol=tolerance * wanted.detach().abs().max().item(),
        msg=lambda m: f"{what}: {m}",
    )


def check_products() -> None:
    """Every layout, with what a product may do on the way, in bfloat16 into float32 as for ``main_grad``."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm, general_grouped_gemm

    torch.manual_seed(0)
    x, w, dy = torch.randn(4, 6, 32), torch.randn(16, 32), torch.randn(4, 6, 16)
    bias = torch.randn(16)
    close(general_gemm(w, x, bias=bias)[0], F.linear(x, w, bias), "TN")
    close(general_gemm(w, dy, layout="NN", grad=True)[0], dy @ w, "NN")
    flat_x, flat_dy = x.view(-1, 32), dy.view(-1, 16)
    dw, db, *_ = general_gemm(flat_x, flat_dy, layout="NT", grad=True, bias=bias)
    close(dw, flat_dy.T @ flat_x, "NT")
    close(db, flat_dy.sum(0), "bias gradient")
    out, _, before, _ = general_gemm(w, x, gelu=True)
    close(before, F.linear(x, w), "input of gelu")
    close(out, F.gelu(F.linear(x, w), approximate="tanh"), "gelu")

    main = torch.ones(16, 32)
    half = flat_x.bfloat16(), flat_dy.bfloat16()
    general_gemm(*half, out_dtype=torch.float32, layout="NT", grad=True, out=main, accumulate=True)
    close(main, 1 + half[1].float().T @ half[0].float(), "accumulated")

    splits, experts = [5, 0, 9], torch.randn(3, 16, 32)
    rows, d_rows = torch.randn(14, 32), torch.randn(14, 16)
    out = torch.full((14, 16), float("nan"))
    general_grouped_gemm(
        list(experts), list(rows.split(splits)), [out], [None] * 3, torch.float32, single_output=True, m_splits=splits
    )
    close(out, torch.cat([r @ e.T for r, e in zip(rows.split(splits), experts, strict=True)]), "grouped")
    for accumulate in (False, True):
        sums = [torch.ones(16, 32) for _ in splits]
        parts = list(rows.split(splits)), list(d_rows.split(splits))
        general_grouped_gemm(*parts, sums, [None] * 3, torch.float32, layout="NT", grad=True, accumulate=accumulate)
        for got, r, d in zip(sums, *parts, strict=True):
            close(got, d.T @ r + accumulate, f"grouped gradient, accumulate {accumulate}")


def check_norms() -> None:
    import transformer_engine_torch as tex
    from transformer_engine_torch import DType

    torch.manual_seed(0)
    x, w, b, dz = (torch.randn(*shape) for shape in ((3, 5, 32), (32,), (32,), (3, 5, 32)))
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    for zero_centered in (False, True):
        gamma = leaves[1] + zero_centered
        wanted = F.layer_norm(leaves[0], (32,), gamma, leaves[2], 1e-5)
        y, mean, rsigma = tex.layernorm_fwd(x, w, b, 1e-5, None, None, DType.kFloat32, 0, zero_centered)
        close(y, wanted, "layer norm")
        grads = torch.autograd.grad(wanted, leaves, dz)
        for got, grad in zip(tex.layernorm_bwd(dz, x, mean, rsigma, w, 0, zero_centered), grads, strict=True):
            close(got, grad, "layer norm's gradients")
        wanted = F.rms_norm(leaves[0], (32,), leaves[1] + zero_centered, 1e-5)
        y, _, rsigma = tex.rmsnorm_fwd(x, w, 1e-5, None, None, DType.kFloat32, 0, zero_centered)
        close(y, wanted, "RMS norm")
        grads = torch.autograd.grad(wanted, leaves[:2], dz)
        for got, grad in zip(tex.rmsnorm_bwd(dz, x, rsigma, w, 0, zero_centered), grads, strict=True):
            close(got, grad, "RMS norm's gradients")


def check_attention() -> None:
    """The rotary embedding turns as megatron's own does, the backward is the transpose; softmax against autograd."""
    import transformer_engine_torch as tex
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    torch.manual_seed(0)
    x, freqs = torch.randn(6, 2, 4, 16, requires_grad=True), torch.randn(6, 1, 1, 8)
    form = tex.NVTE_QKV_Format.NVTE_SBHD
    for interleaved in (False, True):
        wanted = _apply_rotary_pos_emb_bshd(x, freqs, rotary_interleaved=interleaved)
        close(tex.fused_rope_forward(x.detach(), freqs, None, form, interleaved, None, 1, 0), wanted, "rope")
        grad = torch.randn(wanted.shape)
        (back,) = torch.autograd.grad(wanted, x, grad)
        close(tex.fused_rope_backward(grad, freqs, None, form, interleaved, None, 1, 0), back, "rope's gradient")
    scores = torch.randn(2, 3, 5, 5, requires_grad=True)
    wanted = (scores * 0.5 + torch.full((5, 5), float("-inf")).triu(1)).softmax(-1)
    weights = tex.scaled_aligned_causal_masked_softmax_forward(scores.detach(), 0.5)
    close(weights, wanted, "causal softmax")
    grad = torch.randn(wanted.shape)
    (back,) = torch.autograd.grad(wanted, scores, grad)
    close(tex.scaled_aligned_causal_masked_softmax_backward(grad, weights, 0.5), back, "its gradient")


def check_optimizer() -> None:
    """FusedAdam, Transformer Engine's own, beside torch's Adam and AdamW."""
    from transformer_engine.pytorch.optimizers import FusedAdam, multi_tensor_l2norm, multi_tensor_scale

    for decoupled, theirs in ((True, torch.optim.AdamW), (False, torch.optim.Adam)):
        torch.manual_seed(0)
        ours = [torch.nn.Parameter(torch.randn(7, 5)), torch.nn.Parameter(torch.randn(3))]
        copies = [torch.nn.Parameter(p.detach().clone()) for p in ours]
        settings = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        fused, plain = FusedAdam(ours, adam_w_mode=decoupled, **settings), theirs(copies, **settings)
        for _ in range(5):
            for p, q in zip(ours, copies, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
            fused.step(), plain.step()
        for p, q in zip(ours, copies, strict=True):
            close(p.detach(), q.detach(), theirs.__name__)
    tensors, flag = [torch.randn(9), torch.randn(2, 3)], torch.zeros(1, dtype=torch.int)
    norm, each = multi_tensor_l2norm(0, flag, [tensors], True)
    close(norm, torch.cat([t.flatten() for t in tensors]).norm().view(1), "norm")
    close(each, torch.stack([t.norm() for t in tensors]), "each norm")
    half = [torch.empty(9, dtype=torch.bfloat16), torch.empty(2, 3, dtype=torch.bfloat16)]
    multi_tensor_scale(0, flag, [tensors, half], 0.5)
    assert all(torch.equal(h, (t * 0.5).bfloat16()) for h, t in zip(half, tensors, strict=True)) and not flag.item()
    multi_tensor_scale(0, flag, [[torch.tensor([float("inf")])], [torch.empty(1)]], 1.0)
    assert flag.item() == 1


def check_fp8() -> None:
    """Casts beside Transformer Engine's own reference, dequantisation, and update of delayed scales in Python."""
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch import DType, Float8BlockQuantizer, Float8CurrentScalingQuantizer
    from transformer_engine.pytorch.custom_recipes.reference_current_scaling import CurrentScalingQuantizerRef
    from transformer_engine.pytorch.quantization import _amax_and_scale_update
    from transformer_engine_torch import fused_amax_and_scale_update_after_reduction
    from transformer_engine_torch.quantize import dequantize_for_gemm

    torch.manual_seed(0)
    x = torch.randn(160, 144) * torch.logspace(-6, 3, 160)[:, None]
    for kind, dtype in ((DType.kFloat8E4M3, torch.float8_e4m3fn), (DType.kFloat8E5M2, torch.float8_e5m2)):
        for values in (x, x.bfloat16(), torch.zeros(16, 16)):
            reference = CurrentScalingQuantizerRef(dtype=dtype, rowwise=True, columnwise=True)
            wanted = reference.quantize(values)
            got = Float8CurrentScalingQuantizer(kind, torch.device("cpu"))(values)
            assert torch.equal(got._data.view(torch.uint8), wanted.data.view(torch.uint8))
            assert torch.equal(got._transpose.view(torch.uint8), wanted.data_t.view(torch.uint8))
            close(got._scale_inv.view(-1), wanted.scale.view(-1).float(), "inverse scale")
        half_step = 2.0 ** -(4 if dtype == torch.float8_e4m3fn else 3)
        for dim in (1, 2):
            quantizer = Float8BlockQuantizer(kind, rowwise=True, columnwise=True, block_scaling_dim=dim)
            got = quantizer(x)
            rows = dequantize_for_gemm(got, rowwise=True)
            assert torch.equal(rows, got.dequantize())  # Transformer Engine's Python reads the same layout
            columns = dequantize_for_gemm(got, rowwise=False)
            assert torch.equal(columns, rows) == (dim == 2)  # squares are the same from both sides
            scales = got._rowwise_scale_inv[got._rowwise_scale_inv > 0]
            assert torch.equal(scales.log2(), scales.log2().round())
            if dim == 1:
                for back, axis in ((rows, 1), (columns, 0)):
                    error = (back - x).abs().amax(axis) / x.abs().amax(axis)
                    assert error.max() <= half_step  # of the largest of a block

    recipe = DelayedScaling(margin=1, amax_history_len=4, amax_compute_algo="max")
    history, scale = torch.rand(4, 3) * 100, torch.rand(3) + 1
    history[:, 1] = 0
    ours = history.clone(), scale.clone()
    reduced = history[0].clone()
    fused_amax_and_scale_update_after_reduction(reduced, [ours[0]], [ours[1]], "max", DType.kFloat8E4M3, 1)
    _amax_and_scale_update(history, scale, 448.0, recipe)
    assert torch.equal(ours[0], history)
    close(ours[1], scale, "delayed scale")


def check_accumulation() -> None:
    """What stands in for apex over Transformer Engine's GEMM adds the weight's gradient, in float32 and bfloat16."""
    import fused_weight_gradient_mlp_cuda as module

    assert "megatron_dynmoe.host.accumulation" in module.__doc__
    torch.manual_seed(0)
    x, grad = torch.randn(24, 32).bfloat16(), torch.randn(24, 16).bfloat16()
    product = grad.float().T @ x.float()
    main = torch.ones(16, 32)
    module.wgrad_gemm_accum_fp32(x, grad, main)
    close(main, 1 + product, "float32")
    main = torch.ones(16, 32, dtype=torch.bfloat16)
    module.wgrad_gemm_accum_fp16(x, grad, main)
    assert torch.equal(main, (1 + product).bfloat16())


CHECKS = (check_products, check_norms, check_attention, check_optimizer, check_fp8, check_accumulation)
