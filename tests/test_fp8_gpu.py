"""FP8 experts on a GPU: torch's kernel against the emulation on the same device.  Needs a Hopper, has not run yet."""

import pytest
import torch

from megatron_dynmoe.experts.fp8 import RECIPES, Fp8Recipe
from megatron_dynmoe.experts.fp8_linear import Fp8Linear

pytestmark = pytest.mark.gpu

SIZES = [[300, 0, 1, 211], [0, 0, 0, 512], [16, 16, 16, 16]]


def run(linear, sizes, *, wait="error"):
    """Output and both gradients; the device is not waited for in between."""
    torch.manual_seed(7)
    x = torch.randn(sum(sizes), 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(len(sizes), 384, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(sum(sizes), 384, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor(sizes).cumsum(0).int().cuda()
    torch.cuda.set_sync_debug_mode(wait)
    try:
        out = linear(x, weight, ends)
        grads = torch.autograd.grad(out, (x, weight), grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return out.detach(), *grads


@pytest.mark.parametrize("wgrad", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_kernel_equals_the_emulation(sizes, wgrad):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("torch's row-wise grouped kernel is for compute capability 9.0")
    recipe = Fp8Recipe(scaling="rowwise", format="e4m3", wgrad=wgrad)
    kernel = run(Fp8Linear(len(sizes), recipe, emulate=False), sizes)
    emulated = run(Fp8Linear(len(sizes), recipe).cuda(), sizes, wait="default")
    for got, wanted in zip(kernel, emulated, strict=True):
        # bfloat16's 2^-8; sums of at most 512 products in the tensor cores keep about 14 bits, so 2^-13 of their size
        size = wanted.float().abs().max()
        assert (got.float() - wanted.float()).abs().max() <= 2.0**-8 * size + 2.0**-13 * 512**0.5 * size
    idle = [e for e, size in enumerate(sizes) if size == 0]
    assert all(kernel[2][e].eq(0).all() for e in idle)


@pytest.mark.parametrize("scaling", RECIPES)
def test_emulation_on_a_gpu_equals_the_cpus(scaling):
    """The casts are the same bit by bit; sums in another order."""
    linear = Fp8Linear(4, Fp8Recipe(scaling=scaling))
    torch.manual_seed(3)
    x, weight, ends = torch.randn(130, 144), torch.randn(4, 160, 144), torch.tensor([5, 5, 6, 130]).int()
    cpu = linear(x, weight, ends)
    gpu = linear.cuda()(x.cuda(), weight.cuda(), ends.cuda()).cpu()
    assert torch.allclose(cpu, gpu, rtol=1e-4, atol=1e-3)
