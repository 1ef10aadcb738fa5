"""Quantization noise: measured (MSE, SQNR, clipped fraction) and modelled (J(s), section 2 of the paper).

All sums are computed in float64. As for clipping scalars, `dim=None` gives one figure of shape [], and `dim=d` gives
one figure for each index of dimension d, with the other dimensions kept at size 1. Empty tensors have no noise: MSE 0,
clipped fraction 0.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qat_runner.quant.estimators import fake_quantize
from qat_runner.quant.formats import Format, as_format
from qat_runner.quant.tensors import compute_dtype


class Noise(NamedTuple):
    """The noise from quantizing a tensor, over the whole tensor; each field is a tensor of shape [], float64."""

    mse: Tensor
    """mean (x - Q(x))^2, in squared units of x"""
    sqnr_db: Tensor
    """10 log10(sum x^2 / sum (x - Q(x))^2), in dB; infinite where there is no noise"""
    clipped_fraction: Tensor
    """fraction of the elements outside the clipping interval, 0 to 1"""


def _mean(t: Tensor, dim: int | None) -> Tensor:
    dims = tuple(d for d in range(t.ndim) if dim is None or d != dim % t.ndim)
    count = math.prod(t.shape[d] for d in dims)
    return t.sum(dims, keepdim=dim is not None, dtype=torch.float64) / max(count, 1) if dims else t.double()


@torch.no_grad()
def mse(x: Tensor, q: Tensor, dim: int | None = None) -> Tensor:
    """Empirical MSE: mean (x - q)^2 in squared units of x.

    Args:
        x: the tensor, any shape and floating dtype.
        q: its quantized version, same shape.
        dim: None for one figure, or the dimension that gets one figure per index.
    """
    return _mean((x.double() - q.double()).square_(), dim)


@torch.no_grad()
def sqnr_db(x: Tensor, q: Tensor, dim: int | None = None) -> Tensor:
    """Signal-to-quantization-noise ratio 10 log10(mean x^2 / mean (x - q)^2), in dB.

    Infinite where q equals x (all-zero and empty rows included).

    Args:
        x: the tensor, any shape and floating dtype.
        q: its quantized version, same shape.
        dim: None for one figure, or the dimension that gets one figure per index.
    """
    noise = mse(x, q, dim)
    return torch.where(noise == 0, math.inf, 10 * (_mean(x.double().square_(), dim) / noise).log10())


@torch.no_grad()
def clipped_fraction(x: Tensor, s: Tensor | float, format: Format | int, dim: int | None = None) -> Tensor:
    """Fraction of the elements that lie outside [-s, s], or outside [0, s] if unsigned; 0 to 1.

    Args:
        x: the tensor, any shape and floating dtype.
        s: clipping scalar(s), broadcastable to x.
        format: number format, which determines the interval; a number B means signed B-bit integers.
        dim: None for one figure, or the dimension that gets one figure per index.
    """
    a = x.to(compute_dtype(x))  # with a half-precision x, PyTorch would round a zero-dimensional s to the dtype of x
    low, high = as_format(format).clipping_bounds(torch.as_tensor(s, device=x.device))
    return _mean((a > high) | (a < low), dim)


@torch.no_grad()
def expected_mse(
    x: Tensor, s: Tensor | float, format: Format | int, dim: int | None = None, *, missing_code: bool = False
) -> Tensor:
    """The paper's model of the clipped MSE, over the empirical distribution of x.

        J(s) = k s^2 P(0 < |x| <= s) + E[(|x| - s)^2 1{|x| > s}],      k = 4^-B / 3, or 4^-B / 12 when unsigned

    Args:
        x: the tensor, any shape and floating dtype; for an unsigned format, max(x, 0) takes the place of |x|.
        s: clipping scalar(s) > 0 in units of x, broadcastable to x. Oriented formats allow negative values.
        format: number format to round to, whose `rounding_noise` is k; a number B means signed B-bit integers.
        dim: None for one figure, or the dimension that gets one figure per index.
        missing_code: values on the side without a code at s are clipped to the last code instead of s; in an oriented
            format this is always the case.

    Returns:
        J in squared units of x, float64.
    """
    format = as_format(format)
    k = format.rounding_noise
    if format.parts == 2:
        low, high = format.clipping_bounds(torch.as_tensor(s, dtype=torch.float64, device=x.device))
        a = x.double()
        clipped = torch.minimum(torch.maximum(a, low), high)
        return _mean(k * (high - low).square() * ((a != 0) & (clipped == a)) + (a - clipped).square_(), dim)
    a = (x.abs() if format.signed else x.clamp(min=0)).double()
    s = torch.as_tensor(s, dtype=torch.float64, device=x.device)
    end = s.abs()
    if missing_code or format.oriented:
        end = torch.where(x * torch.where(s < 0, -1.0, 1.0) > 0, format.levels[-1] * end, end)
    rounded = k * s.square() * ((a > 0) & (a <= end))
    return _mean(rounded + (a - end).clamp_(min=0).square_(), dim)


def measure(x: Tensor, s: Tensor | float, format: Format | int) -> Noise:
    """Quantize x with clipping scalar(s) s and measure the noise over the whole tensor.

    Args:
        x: any shape and floating dtype.
        s: clipping scalar(s) in units of x, broadcastable to x.
        format: number format to round to; a number B means signed B-bit integers.
    """
    x = x.detach()
    return noise_of(x, fake_quantize(x, s, format), s, format)


def noise_of(x: Tensor, q: Tensor, s: Tensor | float, format: Format | int, clipped: Tensor | None = None) -> Noise:
    """Measure the noise of a quantized tensor, over the whole tensor.

    Args:
        x: the tensor, any shape and floating dtype.
        q: its quantized version, same shape.
        s: clipping scalar(s) in units of x, broadcastable to x.
        format: number format, which determines the clipping interval.
        clipped: values that are compared with the clipping interval, shape of x; None for x itself.
    """
    return Noise(mse(x, q), sqnr_db(x, q), clipped_fraction(x if clipped is None else clipped, s, format))
