"""Each operation fused into one loop over memory by torch.compile: C++ on a CPU, Triton on a GPU.

What is compiled is small and works on one- or two-dimensional views with symbolic sizes: a handful of kernels for a
process, never one for each layer or batch size. They are kept in PyTorch's cache on disk. Where compiling fails, a
warning says so once, and `eager` takes over.
"""

import functools
import importlib.util
import os
import shutil
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qat_runner.quant.grid import Grid
from qat_runner.quant.kernels import eager
from qat_runner.quant.kernels.eager import compute_dtype

_broken = False


@functools.cache
def available() -> bool:
    """Whether there is something to compile with on this machine."""
    if torch.cuda.is_available():
        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if name)


def reader(x: Tensor, unit: Tensor, signed: bool, dims: tuple[int, ...]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """As `eager.reader`; each read is one pass over x, and nothing is copied."""
    rows = None if torch.compiler.is_compiling() else _rows(x, dims)
    if rows is None:
        return eager.reader(x, unit, signed, dims)
    shape = unit.shape
    kernel = _sums_of_rows if rows.ndim == 2 else _sums
    unit = unit.reshape(rows.shape[:-1])

    def read(s: Tensor) -> tuple[Tensor, ...]:
        sums = _call(kernel, rows, s.reshape(unit.shape), unit, int(signed))
        if sums is None:
            return eager.reader(x, unit.reshape(shape), signed, dims)(s)
        return tuple([t.reshape(shape) for t in sums])

    return read


def fake_quantize(x: Tensor, s: Tensor, grid: Grid) -> Tensor:
    """As `eager.fake_quantize`; one read and one write."""
    if torch.compiler.is_compiling():
        return _fake_quantize(x, s.to(compute_dtype(x)), grid.levels_per_scalar, grid.lowest, grid.highest)
    flat = _flatten(x, s)
    out = flat and _call(_fake_quantize, *flat, grid.levels_per_scalar, grid.lowest, grid.highest)
    return eager.fake_quantize(x, s, grid) if out is None else _unflatten(out, x)


def fake_quantize_backward(grad: Tensor, x: Tensor, s: Tensor, signed: bool, gradient: str) -> Tensor:
    """As `eager.fake_quantize_backward`; two reads and one write."""
    if gradient == "ste":
        return grad
    if torch.compiler.is_compiling():
        return (_pwl if gradient == "pwl" else _mad)(grad, x, s.to(compute_dtype(x)), int(signed))
    flat = _flatten(x, s)
    if flat is not None:
        grad_flat = _flatten(grad.contiguous(memory_format=_memory_format(x)), s)
        assert grad_flat is not None
        out = _call(_pwl if gradient == "pwl" else _mad, grad_flat[0], *flat, int(signed))
        if out is not None:
            return _unflatten(out, x)
    return eager.fake_quantize_backward(grad, x, s, signed, gradient)


# Kernels. x is [n] with s [], or [rows, n] with s [rows, 1]; integer arguments are symbols, not constants.


def _sums(x: Tensor, s: Tensor, unit: Tensor, signed: int) -> tuple[Tensor, ...]:
    a = _magnitudes(x, signed)
    scaled = a / unit
    over = scaled - s
    return over.clamp(min=0).sum(), _count(over > 0), scaled.sum(), _count(a > 0), scaled.amax()


def _sums_of_rows(x: Tensor, s: Tensor, unit: Tensor, signed: int) -> tuple[Tensor, ...]:
    a = _magnitudes(x, signed)
    scaled = a / unit[:, None]
    over = scaled - s[:, None]
    return over.clamp(min=0).sum(1), _count(over > 0, 1), scaled.sum(1), _count(a > 0, 1), scaled.amax(1)


def _magnitudes(x: Tensor, signed: int) -> Tensor:
    x = x.to(compute_dtype(x))
    return x.abs() if signed else x.clamp(min=0)


def _count(mask: Tensor, *dims: int) -> Tensor:
    return mask.sum(*dims, dtype=torch.float32)


def _fake_quantize(x: Tensor, s: Tensor, levels: int, lowest: int, highest: int) -> Tensor:
    q = x.to(s.dtype) / torch.where(s == 0, 1.0, s) * levels
    q = q.round().clamp(lowest, highest) * (1.0 / levels) * s
    return q if q.dtype == x.dtype else q.to(x.dtype)  # .to() of the same dtype would be an alias


def _pwl(grad: Tensor, x: Tensor, s: Tensor, signed: int) -> Tensor:
    x = x.to(s.dtype)
    return torch.where((x <= s) & (x >= -s * signed), grad, 0.0)


def _mad(grad: Tensor, x: Tensor, s: Tensor, signed: int) -> Tensor:
    x = x.to(s.dtype)
    clipped = torch.minimum(torch.maximum(x, -s * signed), s)
    return (torch.where(x == 0, 1.0, clipped / x) * grad).to(grad.dtype)


@functools.cache
def _compile(kernel: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """The kernel compiled for one dtype. Each gets a code object of its own, since PyTorch limits variants by that."""
    code = kernel.__code__.replace(co_name=f"{kernel.__name__}_{dtype}".replace(".", "_"))
    return torch.compile(types.FunctionType(code, kernel.__globals__), dynamic=True, fullgraph=True)


def _call(kernel: Callable[..., Any], *args: Any) -> Any:
    """The kernel's result; None, and a warning the first time, if compiling fails."""
    global _broken
    if _broken:
        return None
    try:
        with torch.no_grad():
            return _compile(kernel, args[0].dtype)(*args)
    except torch._dynamo.exc.TorchDynamoException as error:
        _broken = True
        reason = str(error).strip().splitlines()[0]
        warnings.warn(
            f"backend=compiled: compiling failed, going on with eager ({reason})", RuntimeWarning, stacklevel=3
        )
        return None


# Views: memory order is all that matters to elementwise loops and sums.


def _memory_format(x: Tensor) -> torch.memory_format:
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _dense(x: Tensor) -> Tensor:
    """x with its dimensions in memory order, so that it can be flattened; a copy only if x has gaps."""
    return x.permute(0, 2, 3, 1) if _memory_format(x) == torch.channels_last else x.contiguous()


def _rows(x: Tensor, dims: tuple[int, ...]) -> Tensor | None:
    """x as [n] if one scalar spans it all, as [rows, n] if one spans each index of dimension 0, else None."""
    x = x.detach()
    if x.numel() == 0:
        return None
    if len(dims) == x.ndim:
        return _dense(x).reshape(-1)
    return _dense(x).reshape(x.shape[0], -1) if dims == tuple(range(1, x.ndim)) else None


def _flatten(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor] | None:
    """x and s as [n] and [], or [rows, n] and [rows, 1]; None for other granularities."""
    s = s.detach().to(compute_dtype(x))
    if s.numel() == 1:
        rows = _rows(x, tuple(range(x.ndim)))
        return None if rows is None else (rows, s.reshape(()))
    if s.ndim == x.ndim and s.numel() == s.shape[0] == x.shape[0]:
        rows = _rows(x, tuple(range(1, x.ndim)))
        return None if rows is None else (rows, s.reshape(-1, 1))
    return None


def _unflatten(flat: Tensor, x: Tensor) -> Tensor:
    """Back to the shape and memory format of x."""
    if _memory_format(x) == torch.channels_last:
        n, c, h, w = x.shape
        return flat.reshape(n, h, w, c).permute(0, 3, 1, 2)
    return flat.reshape(x.shape)
