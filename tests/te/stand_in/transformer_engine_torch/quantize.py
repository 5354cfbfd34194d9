"""Casts to FP8 and back: ``csrc/quantizer.cpp``, ``csrc/extensions/cast.cpp`` and the kernels' scales.

Numbers are those of the recipe: torch's float8 types round to nearest even as the kernels do, after saturation. The
scale is ``compute_scale_from_amax`` of ``common/recipe/recipe_common.cuh``: largest number over largest magnitude, one
where there is none, rounded down to a power of two where the recipe says so. Layouts are Hopper's: a
product reads its operands row by row, so whoever needs a tensor in the other direction keeps a transposed copy.
"""

from typing import Any

import torch
import torch.distributed

from transformer_engine_torch.dtypes import to_torch

BLOCK = 128


def scale_of_amax(amax: torch.Tensor, largest: float, power_of_two: bool, epsilon: float) -> torch.Tensor:
    """What to multiply with before the cast; same shape as ``amax``, float32."""
    amax = amax.float().clamp_min(epsilon)
    scale = (largest / amax).clamp_max(torch.finfo(torch.float32).max)
    scale = torch.where(torch.isfinite(amax) & (amax > 0), scale, torch.ones_like(scale))
    if power_of_two:  # the mantissa's bits are cut off
        scale = (scale.view(torch.int32) & -0x800000).view(torch.float32)
    return scale


def cast(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x * scale`` in a float8 type, saturated, as bytes."""
    largest = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-largest, largest).to(dtype).view(torch.uint8)


def quantize(tensor: torch.Tensor, quantizer: Any, output: Any = None, noop: torch.Tensor | None = None) -> Any:
    """``tensor`` as ``quantizer`` says, into ``output`` if there is one; nothing happens where ``noop`` is set."""
    if quantizer is None:
        return tensor if output is None else output.copy_(tensor)
    if noop is not None and noop.item() == 1.0:
        return output
    tensor = tensor.detach()
    kind = type(quantizer).__name__
    if kind == "Float8Quantizer":
        quantizer.amax.copy_(torch.maximum(quantizer.amax, _amax(tensor)))  # of no numbers where nobody asks
        return _store_per_tensor(tensor, quantizer, quantizer.scale.float().view(1), output)
    if kind == "Float8CurrentScalingQuantizer":
        amax = _amax(tensor)
        if quantizer.with_amax_reduction:
            group = quantizer._canonicalized_amax_reduction_group()
            torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=group)
        largest = torch.finfo(to_torch(quantizer.dtype)).max
        scale = scale_of_amax(amax, largest, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
        return _store_per_tensor(tensor, quantizer, scale.view(1), output)
    if kind == "Float8BlockQuantizer":
        return _store_blocks(tensor, quantizer, output)
    raise NotImplementedError(f"the stand-in has no {kind}")


def _amax(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.abs().amax().float() if tensor.numel() else torch.zeros((), dtype=torch.float32)


def _transposed(data: torch.Tensor) -> torch.Tensor:
    """[..., D] as [D, ...], contiguous."""
    return data.reshape(-1, data.shape[-1]).T.contiguous().view(data.shape[-1], *data.shape[:-1])


def _classes() -> Any:
    from transformer_engine.pytorch import tensor  # the Python that imports this module: only once it is there

    return tensor


def _store_per_tensor(x: torch.Tensor, quantizer: Any, scale: torch.Tensor, output: Any) -> Any:
    data = cast(x, scale, to_torch(quantizer.dtype))
    if output is not None:
        output._scale_inv.copy_((1 / scale).view(output._scale_inv.shape))
        if output._data is not None:
            output._data.copy_(data.view(output._data.shape))
        output._transpose, output._transpose_invalid = None, True
        if quantizer.columnwise_usage or output._data is None:
            output._transpose, output._transpose_invalid = _transposed(data), False
        return output
    parts = {
        "data": data if quantizer.rowwise_usage else None,
        "data_transpose": _transposed(data) if quantizer.columnwise_usage else None,
        "fp8_scale_inv": 1 / scale,
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return _classes().Float8TensorStorage(fake_dtype=x.dtype, **parts)
    return _classes().Float8Tensor(shape=x.shape, dtype=x.dtype, device=x.device, requires_grad=False, **parts)


def blocks(x: torch.Tensor, quantizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of a matrix [M, K] and what to multiply with to get it back, in the layout of ``get_scale_shape``.

    One scale for 128 x 128 numbers, laid out [tiles of M, tiles of K]; or for 1 x 128, laid out [tiles of K, M]. The
    last axis is padded to a multiple of four.
    """
    dtype = to_torch(quantizer.dtype)
    rows, columns = x.shape
    square = quantizer.block_scaling_dim == 2
    high = BLOCK if square else 1
    padded = torch.nn.functional.pad(x.float(), (0, -columns % BLOCK, 0, -rows % high))
    tiles = padded.view(padded.shape[0] // high, high, padded.shape[1] // BLOCK, BLOCK)
    amax = tiles.abs().amax((1, 3)) if tiles.numel() else tiles.new_zeros(tiles.shape[0], tiles.shape[2])
    scale = scale_of_amax(amax, torch.finfo(dtype).max, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    data = cast(tiles, scale[:, None, :, None], dtype).view(padded.shape)[:rows, :columns].contiguous()
    inverse = 1 / scale if square else (1 / scale).T
    return data, torch.nn.functional.pad(inverse, (0, -inverse.shape[1] % 4)).contiguous()


def _store_blocks(x: torch.Tensor, quantizer: Any, output: Any) -> Any:
    matrix = x.reshape(-1, x.shape[-1])
    parts: dict[str, Any] = dict.fromkeys(
        ("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv")
    )
    if quantizer.rowwise_usage:
        data, parts["rowwise_scale_inv"] = blocks(matrix, quantizer)
        parts["rowwise_data"] = data.view(x.shape)
    if quantizer.columnwise_usage:
        data, parts["columnwise_scale_inv"] = blocks(matrix.T, quantizer)
        parts["columnwise_data"] = data.view(x.shape[-1], *x.shape[:-1])
    if output is not None:
        for name, value in parts.items():
            held = getattr(output, f"_{name}")
            if value is None:  # a copy that this cast does not write is let go, or it would be of older numbers
                setattr(output, f"_{name}", None)
            elif held is not None:
                held.copy_(value.view(held.shape))
            else:
                setattr(output, f"_{name}", value)
        return output
    parts |= {
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
        "is_2D_scaled": quantizer.block_scaling_dim == 2,
    }
    if quantizer.internal:
        return _classes().Float8BlockwiseQTensorStorage(**parts, fake_dtype=x.dtype)
    return _classes().Float8BlockwiseQTensor(
        shape=x.shape, dtype=x.dtype, device=x.device, requires_grad=False, **parts
    )


def split_quantize(
    tensor: torch.Tensor, splits: list[int], quantizers: list[Any], *, disable_bulk_allocation: bool = False
) -> list[Any]:
    """Each part of the rows by its own quantizer."""
    return [quantize(part, own) for part, own in zip(tensor.split(splits), quantizers, strict=True)]


def bgrad_quantize(grad: torch.Tensor, quantizer: Any) -> tuple[torch.Tensor, Any]:
    """The bias' gradient and the quantised ``grad``."""
    return grad.reshape(-1, grad.shape[-1]).float().sum(0).to(grad.dtype), quantize(grad, quantizer)


def fp8_transpose(data: torch.Tensor, dtype: Any, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Bytes [..., D] as [D, ...]."""
    return _transposed(data) if out is None else out.copy_(_transposed(data).view(out.shape))


def dequantize(tensor: Any, dtype: Any) -> torch.Tensor:
    """A per-tensor FP8 tensor in the given type; blocks are taken back by Transformer Engine's own Python."""
    kind = to_torch(tensor._fp8_dtype)
    if tensor._data is not None:
        return (tensor._data.view(kind).float() * tensor._scale_inv).to(to_torch(dtype))
    wide = tensor._transpose.view(kind).float() * tensor._scale_inv
    return wide.reshape(wide.shape[0], -1).T.reshape(*wide.shape[1:], wide.shape[0]).to(to_torch(dtype))


def is_fp8(tensor: Any) -> bool:
    return hasattr(tensor, "_fp8_dtype")


def dequantize_for_gemm(tensor: Any, rowwise: bool) -> torch.Tensor:
    """An operand in float32, in its logical shape, from the copy that Hopper's product would read.

    Raises:
        RuntimeError: the copy for this direction is missing, which the extension refuses as well.
    """
    if not is_fp8(tensor):
        return tensor.detach().float()
    if hasattr(tensor, "_transpose"):  # one scale for all: a transpose says the same as its original
        if (tensor._data if rowwise else tensor._transpose) is None or (not rowwise and tensor._transpose_invalid):
            raise RuntimeError(f"GEMM operand lacks its {'rowwise' if rowwise else 'columnwise'} data")
        return dequantize(tensor, torch.float32)
    data = tensor._rowwise_data if rowwise else tensor._columnwise_data
    inverse = tensor._rowwise_scale_inv if rowwise else tensor._columnwise_scale_inv
    if data is None or inverse is None:
        raise RuntimeError(f"GEMM operand lacks its {'rowwise' if rowwise else 'columnwise'} data")
    matrix = data.reshape(-1, data.shape[-1]) if rowwise else data.reshape(data.shape[0], -1)
    wide = _from_blocks(matrix, inverse, to_torch(tensor._fp8_dtype), square=tensor._is_2D_scaled)
    return wide.view(data.shape) if rowwise else wide.T.reshape(*data.shape[1:], data.shape[0])


def _from_blocks(data: torch.Tensor, inverse: torch.Tensor, dtype: torch.dtype, square: bool) -> torch.Tensor:
    """Bytes [M, K] in float32; the inverse of ``blocks``."""
    rows, columns = data.shape
    if square:
        grid = inverse.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    else:
        grid = inverse.T[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return data.view(dtype).float() * grid
