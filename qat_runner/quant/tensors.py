"""Helpers for tensors: the compute dtype, magnitudes and extremes of rows, and whether operations are recorded."""

import math

import torch
from torch import Tensor

from qat_runner.quant.pool import Pool


def recording() -> bool:
    """Whether operations are recorded or transformed, instead of being just executed.

    This is the case under torch.compile, torch.export, torch.jit.trace and make_fx, under the transforms of torch.func,
    and under any other dispatch mode. Under all of them, the package calls operators that they can handle
    (`kernels.operators`).
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return torch._C._get_tracing_state() is not None or transformed()


def transformed() -> bool:
    """Whether a transform of torch.func, such as grad or vmap, is active outside of a compiler, which handles it."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def is_transient() -> bool:
    """Whether tensors belong to a compiler or a transform, and must not be kept after the call."""
    return torch.compiler.is_compiling() or transformed()


def derivatives_wanted() -> int:
    """Return the number of nested transforms of torch.func that compute derivatives."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return sum(level.key() == torch._C._functorch.TransformType.Grad for level in stack)


def version_key(x: Tensor) -> tuple[int, int]:
    """Return a key that changes with every write to x that PyTorch tracks, and on replaced memory (`x.data = ...`)."""
    return -1 if x.is_inference() else x._version, x.data_ptr()


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that x is reduced and rounded in: float64 for float64, else float32 (fp16, bf16, float32)."""
    return torch.promote_types(x.dtype, torch.float32)


def magnitudes(x: Tensor, signed: bool) -> Tensor:
    """Return the magnitudes that are clipped: |x| if signed, else max(x, 0); a new tensor in `compute_dtype`."""
    a = x.abs() if signed else x.clamp(min=0)
    return a.to(compute_dtype(x))


def scalar_shape(x: Tensor, dims: tuple[int, ...]) -> list[int]:
    """Return the shape of x with size 1 in dims, which is the shape of its clipping scalars."""
    return [1 if d in dims else n for d, n in enumerate(x.shape)]


def extremes(x: Tensor, dims: tuple[int, ...], pool: Pool | None = None) -> Tensor:
    """Return the minimum and the maximum of zero and the elements of each row, in the compute dtype.

    The shape is [2, *scalar_shape(x, dims)]. With a pool, a row includes its parts on all processes.
    """
    if math.prod([x.shape[d] for d in dims]) == 0:
        low = high = x.new_zeros(scalar_shape(x, dims))
    else:
        low, high = (x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)) if dims else (x, x)
    ends = torch.stack([low.clamp(max=0), high.clamp(min=0)]).to(compute_dtype(x))
    return ends if pool is None else torch.stack([-pool.largest(-ends[0]), pool.largest(ends[1])])


def largest(x: Tensor, signed: bool, dims: tuple[int, ...]) -> Tensor:
    """Return the largest magnitude of each row, dimensions kept, in the compute dtype; 0 for an empty row.

    Computed from the extremes of x, since |x| would be a copy.
    """
    if not dims:  # each element is a row by itself, and amax(()) would reduce over everything
        return magnitudes(x, signed)
    if math.prod([x.shape[d] for d in dims]) == 0:
        return x.new_zeros(scalar_shape(x, dims), dtype=compute_dtype(x))
    top = x.amax(dims, keepdim=True)
    top = torch.maximum(top, -x.amin(dims, keepdim=True)) if signed else top.clamp(min=0)
    return top.to(compute_dtype(x))
