"""FP8 experts against the twin in the reference: casts, linear layers, delayed scales; what torch's kernel is given."""

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_dynmoe import reference
from megatron_dynmoe.experts import fp8_rowwise, grouped_mlp
from megatron_dynmoe.experts.fp8 import E4M3, E5M2, RECIPES, Fp8Recipe, cast, scale_of, to_float8
from megatron_dynmoe.experts.fp8_delayed import DelayedScales
from megatron_dynmoe.experts.fp8_linear import Fp8Linear

KINDS = {"e4m3": E4M3, "e5m2": E5M2}
# Two blocks of 128 and a rest in each dimension; no rows, one row, and many.
I, O, SIZES = 144, 160, [5, 0, 1, 130]  # noqa: E741


@pytest.mark.parametrize("kind", KINDS)
def test_the_cast_is_the_formats_rounding(kind):
    torch.manual_seed(0)
    steps = torch.cat([torch.arange(64.0) * 2.0**e for e in range(-20, 14)])
    halves = torch.cat([steps, steps + steps.roll(1)]) / 2  # ties among them
    values = torch.cat([halves, -halves, torch.randn(200) * 2.0 ** torch.randint(-20, 20, (200,))])
    got = to_float8(values, torch.tensor(1.0), KINDS[kind]).float()
    assert got.tolist() == [reference.float8(value, kind) for value in values.tolist()]


@pytest.mark.parametrize("dtype", KINDS.values())
def test_what_is_not_finite_shows(dtype):
    x = torch.tensor([[1.0, math.inf], [-math.inf, 2.0], [math.nan, 3.0]])
    for group in ((1, None), (None, 1), (None, None), (1, 128), (128, 128)):
        for scale in (None, torch.tensor(0.5)):
            assert torch.equal(cast(x, group, dtype, scale=scale).isfinite(), x.isfinite())


def test_scales_at_the_ends():
    largest = torch.finfo(torch.float32).max
    amax = torch.tensor([0.0, 1e-45, 1.0, 3.0, largest, math.inf, math.nan])
    assert scale_of(amax, E4M3).tolist() == pytest.approx([1, largest, 448, 448 / 3, 448 / largest, 1, 1])
    two = scale_of(amax, E4M3, power_of_two=True).tolist()
    assert two == [1, 2.0**127, 256, 128, 2.0**-120, 1, 1]  # rounded down


def tensors(seed=1, dtype=torch.float32):
    torch.manual_seed(seed)
    rows, experts = sum(SIZES), len(SIZES)
    # Rows and columns of very different size, so that what shares a scale matters.
    spread = torch.randn(rows, 1).exp()
    x = torch.randn(rows, I) * spread * torch.randn(I).exp()
    weight, grad = torch.randn(experts, O, I) * torch.randn(O, 1).exp(), 1e-3 * torch.randn(rows, O) * spread
    return x.to(dtype), weight.to(dtype), grad.to(dtype), torch.tensor(SIZES).cumsum(0).int()


def run(linear, x, weight, grad, ends):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear(x, weight, ends)
    return (out.detach(), *torch.autograd.grad(out, (x, weight), grad))


def by_the_reference(recipe, x, weight, grad, scale_L3=None):
    """What the twin makes of each expert, and the same product of absolute values, which bounds the error of sums."""
    outs, to_x, to_weight, bounds = [], [], [], [[], [], []]
    for e, (x_e, grad_e) in enumerate(zip(x.split(SIZES), grad.split(SIZES), strict=True)):
        if SIZES[e] == 0:
            to_weight.append(torch.zeros(O, I))
            bounds[2].append(torch.zeros(O, I))
            continue
        scales = None if scale_L3 is None else list(scale_L3[e])
        results = reference.fp8_linear(x_e, weight[e], grad_e, recipe.scaling, recipe.format, scales)
        for found, result in zip((outs, to_x, to_weight), results, strict=True):
            found.append(result)
        x_e, w_e, grad_e = (2 * t.abs().double() for t in (x_e, weight[e], grad_e))
        for found, bound in zip(bounds, (x_e @ w_e.t(), grad_e @ w_e, grad_e.t() @ x_e), strict=True):
            found.append(bound)
    shapes = (torch.cat, torch.cat, torch.stack)
    exact = [join(parts) for join, parts in zip(shapes, (outs, to_x, to_weight), strict=True)]
    return exact, [join(parts) for join, parts in zip(shapes, bounds, strict=True)]


@pytest.mark.parametrize("format", ["hybrid", "e4m3"])
@pytest.mark.parametrize("scaling", RECIPES)
def test_linear_equals_the_twin(scaling, format):
    recipe = Fp8Recipe(scaling=scaling, format=format)
    x, weight, grad, ends = tensors()
    linear, scale_L3 = Fp8Linear(len(SIZES), recipe), None
    if linear.scales is not None:
        run(linear, *tensors(seed=2))  # a step before, whose amax gives the scales
        linear.scales.update(linear.scales.amax_history[0].clone())
        scale_L3 = linear.scales.scale.clone()
        assert (scale_L3[0] != 1).all()
    exact, bounds = by_the_reference(recipe, x, weight, grad, scale_L3)
    plain = run(
        lambda x, w, _: torch.cat([a @ b.t() for a, b in zip(x.split(SIZES), w, strict=True)]), x, weight, grad, 0
    )
    for got, wanted, bound, unquantised in zip(run(linear, x, weight, grad, ends), exact, bounds, plain, strict=True):
        # The operands are the same bit by bit: what differs is the order of at most 160 float32 additions.
        assert ((got - wanted).abs() <= 160 * torch.finfo(torch.float32).eps * bound).all()
        assert (unquantised - wanted).norm() > 1e-3 * wanted.norm()  # and FP8 it is


def test_weight_gradients_in_full_precision():
    x, weight, grad, ends = tensors()
    got = run(Fp8Linear(len(SIZES), Fp8Recipe(scaling="tensorwise", wgrad=False)), x, weight, grad, ends)[2]
    wanted = [g.t() @ a for g, a in zip(grad.split(SIZES), x.split(SIZES), strict=True)]
    assert torch.equal(got, torch.stack(wanted))


@pytest.mark.parametrize("scaling", RECIPES)
def test_rows_that_are_not_finite_show_in_their_expert_alone(scaling):
    x, weight, grad, ends = tensors()
    x[2] = math.inf
    out, to_x, to_weight = run(Fp8Linear(len(SIZES), Fp8Recipe(scaling=scaling)), x, weight, grad, ends)
    assert out[2].isnan().all() and out[:2].isfinite().all() and out[3:].isfinite().all()
    assert to_x.isfinite().all()
    assert to_weight[0].isnan().any() and to_weight[1:].isfinite().all()
    x[2], grad[7] = 1.0, math.nan
    out, to_x, to_weight = run(Fp8Linear(len(SIZES), Fp8Recipe(scaling=scaling)), x, weight, grad, ends)
    assert out.isfinite().all() and to_x[7].isnan().all() and to_x[:7].isfinite().all()
    assert to_weight[3].isnan().all() and to_weight[:3].isfinite().all()


@pytest.mark.parametrize("scaling", RECIPES)
def test_no_rows_at_all(scaling):
    linear = Fp8Linear(2, Fp8Recipe(scaling=scaling))
    out, to_x, to_weight = run(
        linear, torch.zeros(0, 16), torch.randn(2, 8, 16), torch.zeros(0, 8), torch.zeros(2, dtype=torch.int32)
    )
    assert out.shape == (0, 8) and to_x.shape == (0, 16) and to_weight.eq(0).all()


@pytest.mark.parametrize("algorithm", ["most_recent", "max"])
@pytest.mark.parametrize("length", [1, 3])
def test_delayed_scales_follow_the_history(length, algorithm):
    recipe = Fp8Recipe(scaling="delayed", amax_history_len=length, amax_compute_algo=algorithm, margin=1)
    scales = DelayedScales(1, recipe)
    amaxes = [3.0, 7.0, 1.0, 0.0, math.inf, 0.5, math.nan, 2.0, 2.0, 2.0]
    for step, amax in enumerate(amaxes):
        scales.update(torch.full((1, 3), amax))
        for which, largest in enumerate((448.0, 448.0, 57344.0)):
            wanted = reference.delayed_scales(amaxes[: step + 1], length, algorithm, 1, largest)[-1]
            assert scales.scale[0, which] == pytest.approx(wanted)
    assert scales.amax_history[0].eq(0).all()


def test_amax_is_observed_once_and_in_training_alone():
    linear = Fp8Linear(len(SIZES), Fp8Recipe(scaling="delayed"))
    x, weight, grad, ends = tensors()
    linear.eval()
    run(linear, x, weight, grad, ends)
    assert linear.scales.amax_history.eq(0).all()
    linear.train()
    first = run(linear, x, weight, grad, ends)
    seen = linear.scales.amax_history[0].clone()
    with torch.no_grad():  # a layer that is computed again, and a micro-batch of smaller numbers
        linear(x, weight, ends)
    again = run(linear, x, weight, grad, ends)
    run(linear, x / 2, weight, grad / 2, ends)
    assert torch.equal(linear.scales.amax_history[0], seen)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    wanted = [part.abs().max() if len(part) else torch.tensor(0.0) for part in x.split(SIZES)]
    assert torch.equal(seen[:, 0], torch.stack(wanted)) and torch.equal(seen[:, 1], weight.abs().amax((1, 2)))


def test_scales_that_nobody_updates_are_an_error(monkeypatch):
    from megatron_dynmoe.experts import fp8_delayed

    monkeypatch.setattr(fp8_delayed, "_MOST_PASSES", 3)
    linear = Fp8Linear(len(SIZES), Fp8Recipe(scaling="delayed"))
    for _ in range(3):
        run(linear, *tensors())
    with pytest.raises(RuntimeError, match="update_scales"):
        run(linear, *tensors())
    linear.scales.update(linear.scales.amax_history[0].clone())
    run(linear, *tensors())


def test_scales_stay_float32_and_travel():
    recipe = Fp8Recipe(scaling="delayed", amax_history_len=4)
    scales = DelayedScales(2, recipe)
    for amax in (1.0, 2.0, 3.0):
        scales.update(torch.full((2, 3), amax))
    scales.bfloat16()
    assert scales.scale.dtype == scales.amax_history.dtype == torch.float32
    for length, kept in ((4, [0, 1, 2, 3]), (3, [0, 2, 3]), (1, [0]), (6, [0, 0, 0, 1, 2, 3])):
        other = DelayedScales(1, Fp8Recipe(scaling="delayed", amax_history_len=length))
        other.load_expert(0, scales.of_expert(1))
        assert other.amax_history[:, 0, 0].tolist() == kept
        assert torch.equal(other.scale[0], scales.scale[1])


def test_experts_use_a_linear_layer_each():
    """fc2 (act(fc1 x) * w) with both layers cast, as the reference casts them; the operand between is what is cast."""
    x = tensors()[0]
    fc1, fc2 = torch.randn(len(SIZES), 2 * 32, I) / 12, torch.randn(len(SIZES), I, 32) / 6
    weights, recipe = torch.rand(len(x)), Fp8Recipe(scaling="rowwise", format="e4m3")
    linears = (Fp8Linear(len(SIZES), recipe), Fp8Linear(len(SIZES), recipe))
    got = grouped_mlp(x, weights, fc1, fc2, SIZES, linears=linears)
    start = 0
    for e, size in enumerate(SIZES):
        part = slice(start, start + size)
        start += size
        if size == 0:
            continue
        hidden = reference.fp8_linear(x[part], fc1[e], torch.zeros(size, 64), "rowwise", "e4m3")[0].float()
        gate, up = hidden.chunk(2, dim=-1)
        middle = F.silu(gate) * up * weights[part, None]
        wanted = reference.fp8_linear(middle, fc2[e], torch.zeros(size, I), "rowwise", "e4m3")[0]
        # Another order of sums may move an operand across a tie, by a sixteenth of it: two of them in a row are rare.
        allowed = 2 * (middle.abs().amax(1) / 8)[:, None] * fc2[e].abs().amax(1)
        assert ((got[part] - wanted).abs() <= allowed).all()
        assert (got[part] - wanted).norm() < 1e-3 * wanted.norm()


def scaled_grouped_mm(a, b, scale_a, scale_b, *, offs, out_dtype):
    """torch's kernel as its sources describe it; its meta kernel and the device's assertions check the arguments."""
    meta = [t.to("meta") for t in (a, b, scale_a, scale_b)]
    shape = torch._scaled_grouped_mm(*meta, offs=offs.to("meta"), out_dtype=out_dtype).shape
    assert a.shape[-1] % 16 == b.shape[-2] % 16 == b.shape[-1] % 16 == 0
    starts = F.pad(offs[:-1], (1, 0)).tolist()
    out = torch.full(shape, math.nan, dtype=out_dtype)
    for e, (start, end) in enumerate(zip(starts, offs.tolist(), strict=True)):
        if b.dim() == 3:
            assert end >= start
            product = (a[start:end].float() @ b[e].float()) * scale_a[start:end, None] * scale_b[e]
            out[start:end] = product.to(out_dtype)
        else:
            assert end > start and (end - start) % 16 == 0 and end <= a.shape[1]
            of_a, of_b = scale_a.view(len(starts), -1)[e], scale_b.view(len(starts), -1)[e]
            out[e] = ((a[:, start:end].float() @ b[start:end].float()) * of_a[:, None] * of_b).to(out_dtype)
    return out


@pytest.mark.parametrize("wgrad", [True, False])
def test_the_kernels_arguments_give_the_emulated_numbers(monkeypatch, wgrad):
    monkeypatch.setattr(fp8_rowwise, "_kernel", scaled_grouped_mm)
    recipe = Fp8Recipe(scaling="rowwise", format="e4m3", wgrad=wgrad)
    inputs = tensors(dtype=torch.bfloat16)
    emulated = run(Fp8Linear(len(SIZES), recipe), *inputs)
    kernel = run(Fp8Linear(len(SIZES), recipe, emulate=False), *inputs)
    _, bounds = by_the_reference(recipe, *inputs[:3])
    for got, wanted, bound in zip(kernel, emulated, bounds, strict=True):
        # a float32 sum in another order, then the same rounding to bfloat16, whose 8 bits are at most 2^-7 apart
        allowed = 2.0**-7 * wanted.abs() + 160 * torch.finfo(torch.float32).eps * bound
        assert ((got.double() - wanted.double()).abs() <= allowed).all()


@pytest.mark.parametrize("sizes", [[3, 0, 40], [0, 0, 0], [1, 0, 0]])
def test_the_kernels_shapes_and_dtypes_without_a_device(sizes):
    """On the meta device any wait for a number would fail, and torch's own meta kernel checks its arguments."""
    rows, linear = sum(sizes), Fp8Linear(3, Fp8Recipe(scaling="rowwise", format="e4m3"), emulate=False)
    with torch.device("meta"):
        x, weight = torch.empty(rows, 64, dtype=torch.bfloat16), torch.empty(3, 48, 64, dtype=torch.bfloat16)
        out, to_x, to_weight = run(
            linear, x, weight, torch.empty(rows, 48, dtype=torch.bfloat16), torch.empty(3, dtype=torch.int32)
        )
    assert out.shape == (rows, 48) and to_x.shape == x.shape and to_weight.shape == weight.shape
    assert out.dtype == to_x.dtype == to_weight.dtype == torch.bfloat16


def test_kernel_on_groups_of_all_sizes(monkeypatch):
    """Groups of every size modulo 16 at once, in places that only the device knows."""
    monkeypatch.setattr(fp8_rowwise, "_kernel", scaled_grouped_mm)
    recipe, sizes = Fp8Recipe(scaling="rowwise", format="e4m3"), [0, *range(1, 34), 0]
    torch.manual_seed(3)
    x, weight = torch.randn(sum(sizes), 16).bfloat16(), torch.randn(len(sizes), 32, 16).bfloat16()
    grad, ends = torch.randn(sum(sizes), 32).bfloat16(), torch.tensor(sizes).cumsum(0).int()
    emulated = run(Fp8Linear(len(sizes), recipe), x, weight, grad, ends)
    kernel = run(Fp8Linear(len(sizes), recipe, emulate=False), x, weight, grad, ends)
    for got, wanted in zip(kernel, emulated, strict=True):
        # as above; sums near zero differ by what 34 additions of numbers near one do
        assert torch.allclose(got.float(), wanted.float(), rtol=2.0**-7, atol=1e-5)
    assert kernel[2][0].eq(0).all() and kernel[2][-1].eq(0).all()
