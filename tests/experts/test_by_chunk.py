"""Gated experts chunk by chunk on a CPU: equal to one row after another, forward and backward, whatever was kept."""

import pytest
import torch

from megatron_dynmoe import reference
from megatron_dynmoe.experts import by_chunk, grouped_mlp, products
from megatron_dynmoe.experts.grouped import grouped_linear

D, F = 16, 24
# no row first, one row, a full chunk of the small limit below, several, no row last
SIZES = [0, 1, 8, 37, 0]
LEAVES = ("rows", "weights", "fc1", "fc2")


def case(dtype=torch.float64, sizes=SIZES, width=D, inner=F):
    torch.manual_seed(len(sizes))
    rows, experts = sum(sizes), len(sizes)
    tensors = {
        "rows": torch.randn(rows, width),
        "weights": torch.rand(rows) + 0.1,
        "fc1": torch.randn(experts, 2 * inner, width) * width**-0.5,
        "fc2": torch.randn(experts, width, inner) * inner**-0.5,
    }
    grad = torch.randn(rows, width)
    wide = torch.promote_types(dtype, torch.float32)  # of the weights: float32 beside bfloat16
    made = {name: t.to(dtype).to(wide if name == "weights" else dtype).requires_grad_() for name, t in tensors.items()}
    return made, grad.to(dtype)


def run(function, tensors, grad, sizes=SIZES, **options):
    out = function(*tensors.values(), sizes, **options)
    return [out, *torch.autograd.grad(out, list(tensors.values()), grad)]


@pytest.fixture(params=["kept", "computed again"])
def small_chunks(request, monkeypatch):
    """Chunks of about 8 rows; the first GEMM's output always kept for backward, or never."""
    monkeypatch.setattr(by_chunk, "_LEAST_ROWS", 8)
    monkeypatch.setattr(by_chunk, "_THREADS", 1 << 20)
    monkeypatch.setattr(by_chunk, "_room", lambda *args: 10**9 if request.param == "kept" else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("onednn", [False, True])
def test_equal_to_one_row_after_another(small_chunks, monkeypatch, dtype, offset, onednn):
    monkeypatch.setattr(products, "_SMALLEST_WEIGHT", 1 if onednn else 1 << 60)
    tensors, grad = case(dtype)
    exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    truth = run(reference.grouped_experts, exact, grad.double(), offset=offset)
    plain = run(reference.grouped_experts, tensors, grad, offset=offset)
    ours = run(grouped_mlp, tensors, grad, offset=offset)
    for wanted, slow, fast in zip(truth, plain, ours, strict=True):
        assert fast.shape == wanted.shape and torch.isfinite(fast).all()
        # twice what the same operations cost a row at a time, and a few roundings for sums in another order
        allowed = 2 * (slow - wanted).abs().max() + 4 * torch.finfo(dtype).eps * wanted.abs().max()
        assert (fast - wanted).abs().max() <= allowed
    for fast, leaf in zip(ours, [tensors["rows"], *tensors.values()], strict=True):
        assert fast.dtype == leaf.dtype


@pytest.mark.parametrize("sizes", [[0, 0, 0], [1, 0, 0], [0, 0, 3]])
def test_few_or_no_rows(small_chunks, sizes):
    tensors, grad = case(sizes=sizes)
    for fast, slow in zip(
        run(grouped_mlp, tensors, grad, sizes), run(reference.grouped_experts, tensors, grad, sizes), strict=True
    ):
        assert torch.allclose(fast, slow, rtol=1e-12, atol=1e-12)  # float64: some thousand times its eps


@pytest.mark.parametrize("activation", [torch.nn.functional.gelu, torch.relu, lambda x: x], ids=["gelu", "relu", "x"])
def test_other_activations(small_chunks, activation):
    tensors, grad = case(torch.float32)
    grouped = run(grouped_mlp, tensors, grad, activation=activation, linears=(grouped_linear, grouped_linear))
    for fast, slow in zip(run(grouped_mlp, tensors, grad, activation=activation), grouped, strict=True):
        # sums of 48 float32 products at most, three after each other, in another order
        assert (fast - slow).abs().max() <= 64 * torch.finfo(torch.float32).eps * slow.abs().max()


@pytest.mark.parametrize("leaf", ["rows", "weights"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_expert(small_chunks, monkeypatch, leaf, value):
    """Padding must carry nothing over: the row is the first of an expert whose neighbour's last chunk is padded."""
    monkeypatch.setattr(products, "_SMALLEST_WEIGHT", 1)
    tensors, grad = case(torch.float32)
    before = run(grouped_mlp, tensors, grad)
    place = 9  # the first row of expert 3
    with torch.no_grad():
        tensors[leaf][place] = value
    out, to_rows, to_weights, to_fc1, to_fc2 = run(grouped_mlp, tensors, grad)
    assert not out[place].isfinite().all()
    assert not to_fc2[3].isfinite().all()
    others = torch.arange(len(grad)) != place
    for now, then in zip((out, to_rows, to_weights), before[:3], strict=True):
        assert torch.equal(now[others], then[others])
    for now, then in zip((to_fc1, to_fc2), before[3:], strict=True):
        assert torch.equal(now[:3], then[:3]) and torch.equal(now[4], then[4])


def test_only_what_is_asked_for(small_chunks):
    """Frozen weights or rows get no gradient, and the others' are what they were."""
    tensors, grad = case(torch.float32)
    _, *wanted = run(grouped_mlp, tensors, grad)
    for frozen in LEAVES:
        leaves = {name: t.detach().requires_grad_(name != frozen) for name, t in tensors.items()}
        grouped_mlp(*leaves.values(), SIZES).backward(grad)
        for (name, tensor), gradient in zip(leaves.items(), wanted, strict=True):
            assert tensor.grad is None if name == frozen else torch.equal(tensor.grad, gradient)


def test_backward_twice_and_weights_used_twice(small_chunks):
    tensors, grad = case(torch.float32)
    out = grouped_mlp(*tensors.values(), SIZES)
    first = torch.autograd.grad(out, list(tensors.values()), grad, retain_graph=True)
    again = torch.autograd.grad(out, list(tensors.values()), grad)
    twice = grouped_mlp(*tensors.values(), SIZES) + grouped_mlp(*tensors.values(), SIZES)
    doubled = torch.autograd.grad(twice, list(tensors.values()), grad)
    for one, two, both in zip(first, again, doubled, strict=True):
        assert torch.equal(one, two) and torch.equal(one * 2, both)


def test_gradients_that_are_views(small_chunks):
    tensors, _ = case(torch.float32)
    grad = torch.ones(()).expand(sum(SIZES), D)  # a sum's
    wanted = run(grouped_mlp, tensors, grad.contiguous())
    assert all(torch.equal(*pair) for pair in zip(run(grouped_mlp, tensors, grad), wanted, strict=True))
    wider = torch.cat([tensors["rows"], tensors["rows"]], dim=1)[:, :D]  # rows that are not contiguous
    assert torch.equal(grouped_mlp(wider, *list(tensors.values())[1:], SIZES), wanted[0])


def test_autocast_changes_no_dtype(small_chunks):
    tensors, grad = case(torch.float32)
    wanted = run(grouped_mlp, tensors, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(grouped_mlp, tensors, grad)
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


def kept_numbers(sizes, width, inner) -> int:
    """Floats that a pass keeps beside its arguments."""
    tensors, kept = case(torch.float32, sizes, width, inner)[0], {}
    arguments = {t.untyped_storage().data_ptr() for t in tensors.values()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = grouped_mlp(*tensors.values(), sizes)
    del out
    return sum(numbers for storage, numbers in kept.items() if storage not in arguments)


def test_what_is_kept_for_backward():
    few, many = [64, 64], [640, 64]
    assert kept_numbers(few, 64, 32) == 0, "the weights' gradients are more than a loop would keep"
    assert kept_numbers(many, 16, 32) == 2 * 32 * 704, "the first product's output of every row"
    with torch.no_grad():
        assert kept_numbers(many, 16, 32) == 0


@pytest.mark.parametrize("pad", [True, False])
def test_chunks_cover_every_row_once(pad):
    sizes = [0, 1, 15, 16, 17, 127, 128, 129, 0, 1000, 4096, 0]
    plan = list(by_chunk.chunks(sizes, 128, pad=pad))
    assert [row for chunk in plan for row in range(chunk.begin, chunk.end)] == list(range(sum(sizes)))
    for expert, rows in enumerate(sizes):
        mine = [chunk for chunk in plan if chunk.expert == expert]
        assert sum(chunk.end - chunk.begin for chunk in mine) == rows
        assert [chunk.first for chunk in mine] == [True, *[False] * (len(mine) - 1)][: len(mine)]
        assert [chunk.last for chunk in mine] == [*[False] * (len(mine) - 1), True][: len(mine)]
        for chunk in mine:
            assert chunk.end - chunk.begin <= chunk.length <= 208  # one and a half of the limit, rounded up to 16
            assert chunk.length % 16 == 0 if pad else chunk.length == chunk.end - chunk.begin


def test_products_see_few_numbers_of_rows():
    """A shape costs oneDNN 0.2 ms when it is new, and it remembers 1024 of them (DNNL's primitive cache)."""
    lengths = {c.length for rows in range(1, 20000) for c in by_chunk.chunks([rows], 512, pad=True)}
    assert len(lengths) * 6 < 1024  # six products a chunk
    assert all(products.row_step(rows) <= max(16, rows / 32) for rows in range(1, 5000))


def test_explicit_products_are_obeyed():
    tensors, calls = case(torch.float32)[0], []

    def recorded(*args):
        calls.append(args[1].shape)
        return grouped_linear(*args)

    out = grouped_mlp(*tensors.values(), SIZES, linears=(recorded, recorded))
    assert len(calls) == 2 and out.shape == (sum(SIZES), D)


def test_a_torch_without_onednn(monkeypatch):
    tensors, grad = case(torch.float32, [40, 90], 128, 128)
    wanted = run(grouped_mlp, tensors, grad, [40, 90])
    assert products.product_for(tensors["rows"], tensors["fc2"][0])[1] == torch.backends.mkldnn.is_available()
    assert not products.product_for(tensors["rows"], tensors["fc2"][0, :8, :8])[1], "ragged shapes of small products"
    monkeypatch.setattr(products, "_ONEDNN", None)
    for got, with_it in zip(run(grouped_mlp, tensors, grad, [40, 90]), wanted, strict=True):
        # sums of 256 float32 products at most, three after each other, in another order
        assert (got - with_it).abs().max() <= 64 * torch.finfo(torch.float32).eps * with_it.abs().max()
