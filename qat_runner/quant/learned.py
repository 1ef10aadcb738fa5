"""Clipping scalars that are learned together with the weights: the competitors LSQ and PACT.

| name | learned         | initial value           | gradient                                      | weight decay    |
|------|-----------------|-------------------------|-----------------------------------------------|-----------------|
| lsq  | step size D     | 2 mean abs(x)/sqrt(Q_P) | code - x / D inside, the outermost code       | none            |
|      |                 | or OCTAV's, by `start`  | outside, all times 1 / sqrt(N Q_P)            |                 |
| pact | clipping scalar | 10                      | 1 where x >= s (-1 where x <= -s), else 0     | that of weights |

LSQ: Esser et al., "Learned Step Size Quantization", ICLR 2020, for weights and activations. N is the number of weights
that share D, or the number of features of one sample. Q_P is the largest code. At 3 and 2 bits, the weights themselves
are trained with a half and a quarter of the weight decay.

LSQ+: Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and better initialization", 2020,
arXiv 2004.09576, for affine integers, where the lower clipping bound (the offset) is learned as well. The initial
values are those of OCTAV. Zero is represented exactly, so the offset is rounded to an integer number of steps.

PACT: Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks", 2018, arXiv 1805.06085,
for activations, with one alpha per layer. Activations are clipped to [0, alpha] (equation 1) and rounded to 2^B - 1
steps, the last of which ends at alpha (equation 2: an `IntFormat` of full range). The gradient of alpha is that of
equation 3, straight through the rounding. Alpha starts large, and an L2 penalty as strong as that of the weights
reduces it. Weights are quantized as in DoReFa (`quant.dorefa`).

Differences from the PACT paper:
- First and last layers, which PACT and DoReFa leave in full precision, get `first_last_bits`, as under all methods
  here.
- PACT replaces a ReLU, so its inputs are never negative. Inputs that may be negative get a symmetric extension: they
  are clipped to [-alpha, alpha] and rounded to steps of alpha / (2^(B-1) - 1), and both clipping bounds contribute to
  the gradient of alpha.
- Alpha starts at 10, as in other implementations; the paper requires only that it is large.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from qat_runner.quant import kernels
from qat_runner.quant.clipping import mean_magnitude, octav
from qat_runner.quant.dorefa import DoReFa
from qat_runner.quant.estimators import check_single_backward
from qat_runner.quant.formats import Format, IntAffineFormat, IntFormat, Range
from qat_runner.quant.method import Call, ClippingMethod
from qat_runner.quant.orienting import oriented
from qat_runner.quant.quantizer import Quantizer
from qat_runner.quant.state import HALF

LSQ_STARTS = ("lsq", "octav")


class LearnedMethod(ClippingMethod):
    """A method whose scalars are computed from trained parameters; `solve` returns their initial values.

    A subclass also defines `gradients`, and how its parameters relate to scalars and are trained. Its quantizers ignore
    the settings for the gradient estimator, for when scalars are solved, and for synchronization over processes, since
    the gradients of parameters are averaged over processes anyway.
    """

    learned = True

    def scalars(self, learned: Tensor, format: Format) -> Tensor:
        """Return the clipping scalars for a parameter, in its shape.

        By default, the parameter is the scalar. Where a large step of SGD has made it negative or zero, the scalar is
        the smallest positive normal number.
        """
        return learned.clamp(min=torch.finfo(learned.dtype).tiny)

    def parameter(self, s: Tensor, format: Format) -> Tensor:
        """Return the parameter for clipping scalars, in their shape: the inverse of `scalars`."""
        return s

    @property
    def decays(self) -> bool:
        """Whether the weight decay of the recipe also applies to the parameters."""
        return False

    def weight_decay_factor(self, format: Format) -> float:
        """Return the factor for the recipe's weight decay of the weights that this method quantizes."""
        return 1.0

    def gradient_scale(self, count: int, format: Format) -> float:
        """Return the factor for the gradient of a parameter.

        Args:
            count: number of elements that share the parameter; for activations, of one sample.
            format: number format of the quantizer.
        """
        return 1.0

    @abstractmethod
    def gradients(self, grad: Tensor, x: Tensor, s: Tensor, format: Format) -> tuple[Tensor, Tensor]:
        """Return the gradients with respect to x and with respect to the parameter.

        Args:
            grad: gradient of the loss with respect to the output, shape and dtype of x.
            x: the input of the forward pass. Convert it to the compute dtype before combining it with s: in an
                operation with a half-precision x, PyTorch would round a zero-dimensional s to the dtype of x.
            s: clipping scalar(s) of x, broadcastable to x.
            format: the format that x was rounded to.

        Returns:
            The first gradient in the dtype of `grad`. The second gradient in `compute_dtype`, either in the shape of
            the parameter, or in the shape of x, to be summed to that of the parameter. For a format with two clipping
            bounds it has a first dimension of 2, like the parameter.
        """

    def format_of(self, format: Format) -> Format:
        """Return the format that is used when `format` is requested.

        Raises:
            ValueError: if the method has no gradients for it.
        """
        if not isinstance(format, IntFormat):
            raise ValueError(f"clipping {self.name!r} is for plain integers, not for {format.name}")
        return format

    def quantizer(self, format: Format, *, weight: bool, **how: Any) -> Quantizer:
        """Return a quantizer with learned scalars; see `ClippingMethod.quantizer`."""
        known = {key: how[key] for key in ("shape", "sign_known") if key in how}
        return LearnedQuantizer(self.format_of(format), self, per_sample=not weight, **known)


@dataclass(frozen=True)
class LSQ(LearnedMethod):
    """Learned step sizes; see the module docstring."""

    name: ClassVar[str] = "lsq"

    start: str = "lsq"
    """initial step sizes: lsq, as published; or octav, with the least squared error. Formats with two clipping bounds
    always use octav, as LSQ+ does"""

    def __post_init__(self) -> None:
        if self.start not in LSQ_STARTS:
            raise ValueError(f"start={self.start!r}: must be one of {', '.join(LSQ_STARTS)}")

    def format_of(self, format: Format) -> Format:
        """Return the same format, which must be plain or affine integers."""
        return format if isinstance(format, IntAffineFormat) else super().format_of(format)

    def solve(self, x: Tensor, format: Format, dim: int | None, call: Call) -> Tensor:
        """Return the clipping scalar for the initial step size 2 mean |x| / sqrt(Q_P), or that of OCTAV."""
        if isinstance(format, IntAffineFormat) or self.start == "octav":
            return octav(x, format, dim, check=call.check)
        integers = _integers(format)
        factor = 2 * integers.levels_per_scalar / math.sqrt(integers.highest)
        return mean_magnitude(x, format, dim, check=call.check) * factor

    def scalars(self, learned: Tensor, format: Format) -> Tensor:
        """Return s for step sizes D, or low and high for step sizes and lower bounds.

        Step sizes that SGD has made negative or zero are replaced by the smallest positive normal number.
        """
        tiny = torch.finfo(learned.dtype).tiny
        if isinstance(format, IntAffineFormat):
            low = learned[1].clamp(max=0) if format.signed else torch.zeros_like(learned[1])
            high = low + learned[0].clamp(min=tiny) * format.levels_per_scalar
            return torch.stack([low, high.clamp(min=0)])
        return learned.clamp(min=tiny) * float(_integers(format).levels_per_scalar)

    def parameter(self, s: Tensor, format: Format) -> Tensor:
        """Return D for scalars, or D and the lower bound for two clipping bounds."""
        if isinstance(format, IntAffineFormat):
            return torch.stack([format.step(s), s[0]])
        return s / float(_integers(format).levels_per_scalar)

    def weight_decay_factor(self, format: Format) -> float:
        """Return 1/4 at 2 bits and 1/2 at 3 bits, as published; otherwise 1."""
        return {2: 0.25, 3: 0.5}.get(format.bits, 1.0)

    def gradient_scale(self, count: int, format: Format) -> float:
        """Return 1 / sqrt(N Q_P)."""
        largest = format.highest if isinstance(format, IntAffineFormat) else _integers(format).highest
        return 1 / math.sqrt(max(count, 1) * largest)

    def gradients(self, grad: Tensor, x: Tensor, s: Tensor, format: Format) -> tuple[Tensor, Tensor]:
        """Return the gradients of LSQ, the second with respect to the step size (equation 3).

        For affine integers, equations 4 and 5 of LSQ+: the second with respect to step size and lower bound.
        """
        grid = format if isinstance(format, IntAffineFormat) else _integers(format)
        of_x, of_step = kernels.backend(x).learned_backward(grad, x, s, grid, rounding=True)
        return of_x, torch.where(s < 0, -of_step, of_step) if format.oriented else of_step


@dataclass(frozen=True)
class PACT(LearnedMethod):
    """Learned clipping scalars of activations, with the weights of DoReFa; see the module docstring."""

    name: ClassVar[str] = "pact"

    alpha: float = 10.0
    """initial clipping scalar"""

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha}: must be a positive number")

    @property
    def decays(self) -> bool:
        """True, as published: weight decay is what reduces alpha."""
        return True

    def solve(self, x: Tensor, format: Format, dim: int | None, call: Call) -> Tensor:
        """Return alpha, independently of x."""
        return torch.full_like(mean_magnitude(x, format, dim, check=call.check), self.alpha)

    def gradients(self, grad: Tensor, x: Tensor, s: Tensor, format: Format) -> tuple[Tensor, Tensor]:
        """Return the gradients of PACT (equation 3).

        Signed formats, for inputs that do not follow a ReLU, apply the same rule to both sides.
        """
        return kernels.backend(x).learned_backward(grad, x, s, _integers(format), rounding=False)

    def format_of(self, format: Format) -> Format:
        """Return the full-range format of the same integers, as published.

        Raises:
            ValueError: if the oriented range is requested.
        """
        integers = _integers(super().format_of(format))
        if integers.range is Range.ORIENTED:
            raise ValueError(f"range={integers.range}: clipping {self.name!r} always uses the full range")
        return integers.with_range(Range.FULL)

    def quantizer(self, format: Format, *, weight: bool, **how: Any) -> Quantizer:
        """Return a quantizer; see `ClippingMethod.quantizer`. A weight has one scalar, as published."""
        if weight:
            return DoReFa().quantizer(self.format_of(format), weight=True)
        return super().quantizer(format, weight=False, **how)


def _integers(format: Format) -> IntFormat:
    if not isinstance(format, IntFormat):
        raise ValueError(f"learned scalars are for plain integers, not for {format.name}")
    return format


class LearnedQuantizer(Quantizer):
    """A quantizer whose scalars are parameters: initialized once by calibration, then trained.

    It behaves like a static `Quantizer`, except that `s` is updated from the parameter `learned` on each call, in
    training and evaluation. `learned` has the shape of s and holds step sizes or clipping scalars, depending on the
    method, in units of x. Like s, it is at least float32. Its gradient is computed and summed in float32 (float64 for
    float64), whatever x is stored in.

    Args:
        format, method, shape, sign_known: see `Quantizer`.
        per_sample: whether x is a batch of activations, so that the scale of the gradient depends on the number of
            elements of one sample. Samples lie along the first dimension, unless `features` gives this number.
    """

    learned: nn.Parameter
    method: LearnedMethod

    def __init__(
        self,
        format: Format | int,
        method: LearnedMethod,
        *,
        shape: Sequence[int] = (),
        sign_known: bool = True,
        per_sample: bool = False,
    ) -> None:
        super().__init__(format, method, shape=shape, gradient="pwl", sign_known=sign_known, dynamic=False)
        self.per_sample = per_sample
        self.learned = nn.Parameter(torch.zeros_like(self.s))

    @property
    def mode(self) -> str:
        """Always "learned"."""
        return "learned"

    def _quantize(self, x: Tensor, s: Tensor) -> Tensor:
        """Quantize x; the result is also differentiable with respect to `learned`."""
        scale = self.method.gradient_scale(self._count(x), self.format)
        out: Tensor = _Learned.apply(x, self.learned, s, self.format, self.method, scale)
        return out

    def _count(self, x: Tensor) -> int:
        """Return the number of elements of a sample, or of the part of a weight that shares one parameter."""
        if self.per_sample and self.features is not None:
            return self.features
        shares = x.shape[0] if self.per_sample and x.ndim else self.learned.numel() // self.format.parts
        return x.numel() // max(shares, 1)

    def _averaged(self) -> tuple[Tensor, ...]:
        return *super()._averaged(), self.learned

    @torch.no_grad()
    def _scalars(self, x: Tensor) -> Tensor:
        self._constant_scalars()  # raises NotCalibratedError if there are none
        self.s.copy_(self.method.scalars(self.learned, self.format))
        if self.training and self.orientation is not None and isinstance(self.format, IntFormat):
            self._store_signs(oriented(x, self.s, self.format, self.orientation))
        return self.scalars.clone()

    @torch.no_grad()
    def assign(self, s: Tensor, batches: int = 1) -> None:
        """Set the scalars from which learning starts; see `ScalarState.assign`."""
        super().assign(s, batches)
        self.learned.copy_(self.method.parameter(self.s, self.format))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        learned = self.learned.data
        super()._apply(fn, recurse)
        if self.learned.dtype in HALF:  # kept in full precision, like the scalars of every Quantizer
            self.learned.data = learned.to(self.learned.device)
        return self

    def _loaded(self, prefix: str, missing_keys: list[str]) -> None:
        self.static.fill_(1)  # also if the loaded scalars were dynamic: here they are learned
        self._know(static=True)
        if f"{prefix}learned" in missing_keys:  # the scalars of another method are a valid start
            missing_keys.remove(f"{prefix}learned")
            with torch.no_grad():
                self.learned.copy_(self.method.parameter(self.s, self.format))


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, learned: Tensor, s: Tensor, format: Format, method: LearnedMethod, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, learned, s)
        ctx.format, ctx.method, ctx.scale = format, method, scale
        return kernels.backend(x).fake_quantize(x, s, format)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        check_single_backward()
        x, learned, s = ctx.saved_tensors
        of_x, of_learned = ctx.method.gradients(grad, x, s, ctx.format)
        if of_learned.shape != learned.shape:
            ends = of_learned if ctx.format.parts > 1 else of_learned[None]
            shape = learned.shape[ctx.format.parts > 1 :]
            of_learned = torch.stack([end.sum_to_size(shape) for end in ends]).view_as(learned)
        of_learned = of_learned * ctx.scale
        return of_x, of_learned.to(learned.dtype), None, None, None, None
