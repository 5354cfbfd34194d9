"""Adaptive experts in a layer, steered by hand on two ranks; residual MoE; what is refused."""

import pytest
import torch

from tests import ranks
from tests.mcore.layers import B, D, E, F, S, layer_config, layer_of, plans_of, set_up

TOP_ANY = {"gate": "cosine", "rule": "top-any", "cosine_scale": 2.0}


def _adaptive(**fields):
    from megatron_dynmoe.config import DynMoEConfig

    adaptive = {"adaptive_experts": True, "initial_experts": 2, "update_period": 0}
    layer = layer_of(
        layer_config(expert_model_parallel_size=torch.distributed.get_world_size()),
        DynMoEConfig(**TOP_ANY, **adaptive, **fields),
    )
    with torch.no_grad():
        layer.router.weight.copy_(torch.randn(E, D, generator=torch.Generator().manual_seed(3)))
        layer.router.thresholds.fill_(0.1)
    return layer


def _tokens(seed):
    return torch.randn(S, B, D, generator=torch.Generator().manual_seed(seed))


def check_records_and_updates() -> None:
    """Different tokens on each rank; what is recorded and done equals the reference fed with all of them."""
    import torch.distributed as dist

    from megatron_dynmoe import reference
    from megatron_dynmoe.mcore.controllers import Driver

    set_up()
    for policy in ("keep", "fresh", "copy"):
        layer = _adaptive(added_expert_init=policy).train()
        driver = Driver(layer.dynmoe, (layer,))
        before = [_expert(layer, slot) for slot in range(E)]
        active = layer.router.experts_mask.clone()
        assert active.tolist() == [True, False, True, False]
        layer(_tokens(77))  # before the window: not recorded
        driver.call("begin")
        seeds = [10 * dist.get_rank() + batch for batch in range(3)]
        for seed in seeds:  # three micro-batches are one step; the first pass of a recompute has no gradients
            with torch.no_grad():
                layer(_tokens(seed))
            layer(_tokens(seed))
        with torch.no_grad():
            layer.eval()
            layer(_tokens(5))
            layer.train()
        everything = torch.cat([_tokens(10 * rank + b).view(-1, D) for rank in range(2) for b in range(3)])
        scores = reference.cosine_scores(everything, layer.router.weight, 2.0).tolist()
        bound = [torch.sigmoid(torch.tensor(0.2)).item()] * E
        chosen = [reference.top_any_set(row, bound, active.tolist(), training=True) for row in scores]
        kept, embedding = reference.adapt(active.tolist(), chosen, everything)
        numbers, seeded = torch.get_rng_state(), []
        with pytest.MonkeyPatch.context() as patch:  # weights are drawn on one rank: no generator may move there alone
            patch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)  # in a forked rank torch would not try
            for owner in (torch.cuda, torch.cuda.random):
                for name in ("manual_seed", "manual_seed_all", "set_rng_state", "set_rng_state_all"):
                    patch.setattr(owner, name, lambda *args, seeded=seeded: seeded.append(args))
            (event,) = driver.call("end", iteration=1)
        assert torch.equal(torch.get_rng_state(), numbers) and seeded == []
        assert event.unrouted == sum(not c for c in chosen) > 0
        assert event.removed == [e for e in range(E) if active[e] and not kept[e]]
        (slot,) = event.added
        # sums of some 70 float32 terms, in another order
        torch.testing.assert_close(layer.router.weight[slot].detach(), embedding, rtol=0, atol=70 * 2**-24)
        assert layer.router.thresholds[slot] == 0
        assert int(layer.router.experts_mask.sum()) == sum(kept) + 1
        _same_on_all_ranks(layer.router.experts_mask, layer.router.weight.detach(), layer.router.thresholds.detach())
        assert int(layer.router.recorded_rows_E.sum()) == 0
        after = [_expert(layer, e) for e in range(E)]
        nearest = (torch.nn.functional.normalize(layer.router.weight, dim=1) @ embedding).masked_fill(~active, -2)
        for e in range(E):
            if e != slot or policy == "keep":
                assert torch.equal(after[e], before[e])
            elif policy == "copy":
                assert torch.equal(after[e], before[int(nearest.argmax())])
            else:
                assert not torch.equal(after[e], before[e])
                # 2 F D and F D draws of std 0.02; the standard error of a deviation is std / sqrt(2 n)
                assert abs(after[e][: 2 * F * D].std() - 0.02) < 0.02 * 5 / (4 * F * D) ** 0.5


def _expert(layer, slot):
    """All weights of an expert, from the rank that has it."""
    import torch.distributed as dist

    from megatron_dynmoe.mcore.slots import expert_weights

    first = layer.local_expert_indices[0]
    weights = torch.empty(3 * F * D)
    if slot in layer.local_expert_indices:
        weights = torch.cat([w.data.flatten() for w in expert_weights(layer.experts, slot - first)]).clone()
    dist.broadcast(weights, src=slot // layer.num_local_experts)
    return weights


def _same_on_all_ranks(*tensors):
    import torch.distributed as dist

    for tensor in tensors:
        gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, tensor.contiguous())
        assert all(torch.equal(other, tensor) for other in gathered)


def test_records_and_updates_equal_the_reference_on_two_ranks(tmp_path):
    ranks.call(check_records_and_updates, ranks=2, folder=tmp_path)


def check_layer_is_right() -> None:
    from megatron_dynmoe import reference
    from megatron_dynmoe.config import ConfigError, DynMoEConfig

    set_up()
    layer = _adaptive()
    with torch.no_grad():
        layer.experts.weight1.normal_(std=0.3)
        layer.experts.weight2.normal_(std=0.3)
    x = _tokens(1).requires_grad_()
    flat, plans = x.view(-1, D), plans_of(layer)
    for training in (True, False):
        layer.train(training)
        layer.zero_grad()
        out, _ = layer(x)
        scores = reference.cosine_scores(flat, layer.router.weight, 2.0)
        bounds = torch.sigmoid(2.0 * layer.router.thresholds)
        mask = layer.router.experts_mask.tolist()
        chosen = [reference.top_any_set(row, bounds.tolist(), mask, training=training) for row in scores.tolist()]
        assert any(not c for c in chosen) == training
        gate = 1 + (scores - bounds).relu() - (scores - bounds).relu().detach()
        weights = torch.stack(
            [
                torch.stack([gate[t, e] / len(c) if e in c else gate[t, e] * 0 for e in range(E)])
                for t, c in enumerate(chosen)
            ]
        )
        expected = reference.dense_moe(flat, weights, layer.experts.weight1, layer.experts.weight2)
        # float32 sums of 16 and 24 products through two layers, against the same in another order
        torch.testing.assert_close(out.view(-1, D), expected, rtol=1e-5, atol=1e-5)
        if training:
            for t, c in enumerate(chosen):
                assert c or (out.view(-1, D)[t] == 0).all()
        leaves = (x, layer.router.weight, layer.router.thresholds, layer.experts.weight1, layer.experts.weight2)
        upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
        got = torch.autograd.grad((out.view(-1, D) * upstream).sum(), leaves)
        wanted = torch.autograd.grad((expected * upstream).sum(), leaves)
        for mine, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        inactive = [e for e in range(E) if not mask[e]]
        assert (got[3][inactive] == 0).all() and (got[4][inactive] == 0).all() and (got[1][inactive] == 0).all()
    assert [plans[-1].sent_E[e] for e in inactive] == [0, 0]

    low = _adaptive().bfloat16()
    assert low.experts.weight1.dtype == torch.bfloat16
    kept = [low.router.weight, low.router.thresholds, low.router.recorded_sums_BD]
    assert {tensor.dtype for tensor in kept} == {torch.float32}

    residual = layer_of(layer_config(moe_shared_expert_intermediate_size=20), DynMoEConfig(residual=True, top_p=0.5))
    with torch.no_grad():
        residual.mixer.weight.normal_()
        residual.mixer.bias.normal_()
    mixed, _ = residual(x)
    dense = residual.shared_experts(x)
    mixer, residual.mixer = residual.mixer, None
    added, _ = residual(x)
    c = torch.softmax(x @ mixer.weight.t() + mixer.bias, dim=-1)
    expected = c[..., :1] * (added - dense) + c[..., 1:] * dense
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-6)  # the subtraction rounds once more

    for fields, extra, named in (
        ({"initial_experts": 5}, {}, "moe-initial-experts"),
        ({"residual": True}, {}, "moe-shared-expert-intermediate-size"),
        ({"residual": True}, {"moe_shared_expert_intermediate_size": 8, "moe_shared_expert_overlap": True}, "overlap"),
    ):
        with pytest.raises(ConfigError, match=named):
            layer_of(layer_config(**extra), DynMoEConfig(**TOP_ANY, adaptive_experts=True, **fields))


def test_layer_equals_the_reference(tmp_path):
    ranks.call(check_layer_is_right, ranks=1, folder=tmp_path)
