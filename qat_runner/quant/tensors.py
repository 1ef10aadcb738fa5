"""What all of this package asks of a tensor: the dtype to compute in, magnitudes, rows, and whether it is recorded."""

import math

import torch
from torch import Tensor

from qat_runner.quant.pool import Pool


def recording() -> bool:
    """Whether operations are recorded for later tensors than these, or are given another meaning.

    By torch.compile, torch.export, torch.jit.trace and make_fx, by the transforms of torch.func, or by any other mode
    that sees what is dispatched: all of them are given operators that they know (`kernels.operators`).
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return torch._C._get_tracing_state() is not None or transformed()


def transformed() -> bool:
    """Whether a transform of torch.func, such as grad or vmap, is at work, and no compiler that knows of it."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def fleeting() -> bool:
    """Whether tensors are those of a compiler or of a transform, which mean nothing to whoever keeps them."""
    return torch.compiler.is_compiling() or transformed()


def derivatives_wanted() -> int:
    """How many transforms of torch.func that differentiate are at work, one inside the other."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return sum(level.key() == torch._C._functorch.TransformType.Grad for level in stack)


def written(x: Tensor) -> tuple[int, int]:
    """Changes with every write to x of which PyTorch knows, and when its memory is exchanged, as by `x.data = ...`."""
    return -1 if x.is_inference() else x._version, x.data_ptr()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that x is reduced and rounded in: float64 for float64, else float32 (fp16, bf16, float32)."""
    return torch.promote_types(x.dtype, torch.float32)


def magnitudes(x: Tensor, signed: bool) -> Tensor:
    """What is clipped: |x| in a signed format, max(x, 0) in an unsigned one; fresh memory, in `compute_dtype`."""
    a = x.abs() if signed else x.clamp(min=0)
    return a.to(compute_dtype(x))


def kept(x: Tensor, dims: tuple[int, ...]) -> list[int]:
    """The shape of x with size 1 in dims: that of its clipping scalars."""
    return [1 if d in dims else n for d, n in enumerate(x.shape)]


def extremes(x: Tensor, dims: tuple[int, ...], pool: Pool | None = None) -> Tensor:
    """The smallest and the largest element of each row, zero among them: [2, *kept], in the compute dtype.

    Of all parts of the row together, where x is a part of a pool.
    """
    if math.prod([x.shape[d] for d in dims]) == 0:
        low = high = x.new_zeros(kept(x, dims))
    else:
        low, high = (x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)) if dims else (x, x)
    ends = torch.stack([low.clamp(max=0), high.clamp(min=0)]).to(compute_dtype(x))
    return ends if pool is None else torch.stack([-pool.largest(-ends[0]), pool.largest(ends[1])])


def largest(x: Tensor, signed: bool, dims: tuple[int, ...]) -> Tensor:
    """The largest magnitude of each row, dimensions kept, in the compute dtype; 0 for an empty row.

    The extremes of x are read where they lie: |x| would be a copy.
    """
    if not dims:  # each element is a row of its own, and amax(()) would reduce over everything
        return magnitudes(x, signed)
    if math.prod([x.shape[d] for d in dims]) == 0:
        return x.new_zeros(kept(x, dims), dtype=compute_dtype(x))
    top = x.amax(dims, keepdim=True)
    top = torch.maximum(top, -x.amin(dims, keepdim=True)) if signed else top.clamp(min=0)
    return top.to(compute_dtype(x))
