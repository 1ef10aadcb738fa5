"""The operations as PyTorch operators, `torch.ops.qat_runner.*`, which stay opaque wherever operations are recorded.

torch.compile, torch.export and the transforms of torch.func know the output shape and the gradient of each operator,
and call the backend's kernel when it runs. Without operators, a compiler would trace into the loops and unroll them,
and backends that call their own kernels could not be recorded at all. Calls that are not recorded go directly to the
backend, because dispatching an operator costs more than quantizing a small tensor.

There are operators for plain and affine integers (`serves`). They receive the format as three arguments: bits, signed
and range, which is "affine" for affine integers.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qat_runner.quant import kernels
from qat_runner.quant.formats import Format, IntAffineFormat, IntFormat
from qat_runner.quant.kernels.cost import Cost, Search
from qat_runner.quant.tensors import compute_dtype, scalar_shape

AFFINE = "affine"


def serves(format: Format) -> bool:
    """Whether the operators support a format."""
    return type(format) in (IntFormat, IntAffineFormat)


def octav(x: Tensor, cost: Cost, guess: Tensor | None, search: Search) -> Tensor:
    """As `eager.octav`, without a pool."""
    figures = cost.noise, cost.signed, cost.reach
    s: Tensor = _octav(x, guess, cost.short, *figures, list(search.dims), search.iterations, search.tolerance)
    return s


def octav_interval(x: Tensor, noise: float, guess: Tensor | None, search: Search) -> Tensor:
    """As `eager.octav_interval`, without a pool."""
    ends: Tensor = _octav_interval(x, guess, noise, list(search.dims), search.iterations, search.tolerance)
    return ends


def fake_quantize(x: Tensor, s: Tensor, format: Format, gradient: str = "ste") -> Tensor:
    """As `estimators.fake_quantize`, for a format that the operators support."""
    out: Tensor = _fake_quantize(x, s, *_words(format), gradient)
    return out


def fake_quantize_backward(grad: Tensor, x: Tensor, s: Tensor, format: Format, gradient: str) -> Tensor:
    """As `eager.fake_quantize_backward`, for a format that the operators support."""
    if gradient == "ste":
        return grad
    out: Tensor = _fake_quantize_backward(grad, x, s, *_words(format), gradient)
    return out


def _words(format: Format) -> tuple[int, bool, str]:
    return format.bits, format.signed, str(format.range) if isinstance(format, IntFormat) else AFFINE


@functools.cache
def _format(bits: int, signed: bool, range: str) -> Format:
    return IntAffineFormat(bits, signed) if range == AFFINE else IntFormat(bits, signed, range)  # type: ignore[arg-type]


def _laid_out(out: Tensor, as_: Tensor) -> Tensor:
    """Return the result with the strides that its fake kernel reports: those of `torch.empty_like(as_)`."""
    expected = torch.empty_like(as_)
    return out if out.stride() == expected.stride() else expected.copy_(out)


@torch.library.custom_op("qat_runner::octav", mutates_args=())
def _octav(
    x: Tensor,
    guess: Tensor | None,
    short: Tensor | None,
    noise: float,
    signed: bool,
    reach: float,
    dims: Sequence[int],
    iterations: int,
    tolerance: float,
) -> Tensor:
    search = Search(tuple(dims), iterations, tolerance)
    s = kernels.served_by(x).octav(x, Cost(noise, signed, reach, short), guess, search)
    return s.reshape(scalar_shape(x, search.dims)).contiguous()


@_octav.register_fake
def _(x: Tensor, guess: Tensor | None, short: Tensor | None, *figures: Any) -> Tensor:
    return x.new_empty(scalar_shape(x, tuple(figures[3])), dtype=compute_dtype(x))


@torch.library.custom_op("qat_runner::octav_interval", mutates_args=())
def _octav_interval(
    x: Tensor, guess: Tensor | None, noise: float, dims: Sequence[int], iterations: int, tolerance: float
) -> Tensor:
    search = Search(tuple(dims), iterations, tolerance)
    return kernels.served_by(x).octav_interval(x, noise, guess, search).contiguous()


@_octav_interval.register_fake
def _(x: Tensor, guess: Tensor | None, noise: float, dims: Sequence[int], *reads: Any) -> Tensor:
    return x.new_empty((2, *scalar_shape(x, tuple(dims))), dtype=compute_dtype(x))


@torch.library.custom_op("qat_runner::fake_quantize", mutates_args=())
def _fake_quantize(x: Tensor, s: Tensor, bits: int, signed: bool, range: str, gradient: str) -> Tensor:
    return _laid_out(kernels.served_by(x).fake_quantize(x, s, _format(bits, signed, range)), x)


@_fake_quantize.register_fake
def _(x: Tensor, s: Tensor, *words: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("qat_runner::fake_quantize_backward", mutates_args=())
def _fake_quantize_backward(
    grad: Tensor, x: Tensor, s: Tensor, bits: int, signed: bool, range: str, gradient: str
) -> Tensor:
    format = _format(bits, signed, range)
    return _laid_out(kernels.served_by(x).fake_quantize_backward(grad, x, s, format, gradient), x)


@_fake_quantize_backward.register_fake
def _(grad: Tensor, x: Tensor, s: Tensor, *words: Any) -> Tensor:
    return torch.empty_like(x, dtype=grad.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, s, *ctx.words, ctx.gradient = inputs
    if ctx.gradient != "ste":
        ctx.save_for_backward(x, s)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.gradient != "ste":
        grad = _fake_quantize_backward(grad, *ctx.saved_tensors, *ctx.words, ctx.gradient)
    return grad, None, None, None, None, None


torch.library.register_autograd("qat_runner::fake_quantize", _backward, setup_context=_save)


def _batched(t: Tensor, dim: int | None, size: int) -> Tensor:
    """Return a batch of tensors as one tensor whose first dimension is the batch."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _scalars_of_batch(s: Tensor, dim: int | None, x: Tensor, words: Sequence[Any]) -> Tensor:
    """Return the scalars for such a batch x in a shape that broadcasts to it, whether they are batched or shared."""
    if dim is None:
        return s
    s = s.movedim(dim, 0)
    parts = _format(*words[:3]).parts
    ends, shape = s.shape[1:parts], s.shape[parts:]  # ends is [2] for an interval, otherwise empty
    s = s.reshape(len(s), *ends, *[1] * (x.ndim - 1 - len(shape)), *shape)
    return s.movedim(1, 0) if ends else s  # the two clipping bounds always come first


@_fake_quantize.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, s: Tensor, *words: Any) -> tuple[Tensor, int]:
    x = _batched(x, in_dims[0], info.batch_size)
    return _fake_quantize(x, _scalars_of_batch(s, in_dims[1], x, words), *words), 0


@_fake_quantize_backward.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, ...], grad: Tensor, x: Tensor, s: Tensor, *words: Any
) -> tuple[Tensor, int]:
    grad, x = (_batched(t, dim, info.batch_size) for t, dim in zip((grad, x), in_dims, strict=False))
    return _fake_quantize_backward(grad, x, _scalars_of_batch(s, in_dims[2], x, words), *words), 0


def _one_by_one(operator: Any) -> None:
    """Register vmap for an operator that solves for scalars: each tensor of the batch is solved separately."""

    @operator.register_vmap  # type: ignore[untyped-decorator]
    def _(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        def of(i: int) -> list[Any]:
            return [arg.select(d, i) if isinstance(d, int) else arg for arg, d in zip(args, in_dims, strict=True)]

        return torch.stack([operator(*of(i)) for i in range(info.batch_size)]), 0


_one_by_one(_octav)
_one_by_one(_octav_interval)
