"""Clipping scalars that are learned with the weights: the rivals LSQ and PACT.

| name | what is learned | its start               | its gradient                                  | its weight decay |
|------|-----------------|-------------------------|-----------------------------------------------|------------------|
| lsq  | step size D     | 2 mean abs(x)/sqrt(Q_P) | code - x / D inside, the end code outside,    | none             |
|      |                 | or OCTAV's, by `start`  | all times 1 / sqrt(N Q_P)                     |                  |
| pact | clipping scalar | 10                      | 1 from it on (-1 to its negative), 0 else     | that of weights  |

LSQ: Esser et al., "Learned Step Size Quantization", ICLR 2020: for weights and activations. N is the number of weights
that share D, or the number of features of one sample; Q_P the largest code. At 3 and 2 bits it trains the weights
themselves with a half and a quarter of the weight decay.

LSQ+: Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and better initialization", 2020,
arXiv 2004.09576: for affine integers, with the lower end (its offset) learned as well. It begins where OCTAV ends; and
zero stays exact, so that the offset is rounded to a whole number of steps.

PACT: Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks", 2018, arXiv 1805.06085:
for activations, one alpha a layer. They are clipped to [0, alpha] (equation 1) and rounded to 2^B - 1 steps that end
at alpha (equation 2: an `IntFormat` of full range). Alpha's gradient is that of equation 3, straight through the
rounding. Alpha starts large, and an L2 penalty as strong as that of the weights brings it down. Weights are DoReFa's
(`quant.dorefa`).

Where this departs from the paper:
- First and last layers, which PACT and DoReFa leave in full precision, get `first_last_bits`, as under all methods
  here.
- PACT takes the place of a ReLU, so an input is never negative there. One that may be has the symmetric extension: it
  is clipped to [-alpha, alpha] and rounded to steps of alpha / (2^(B-1) - 1), and both ends count for alpha.
- The start is 10, as in reimplementations; what matters to the paper is that it be large.
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
from qat_runner.quant.estimators import refuse_double_backward
from qat_runner.quant.formats import Format, IntAffineFormat, IntFormat, Range
from qat_runner.quant.method import Call, ClippingMethod
from qat_runner.quant.orienting import oriented
from qat_runner.quant.quantizer import Quantizer
from qat_runner.quant.state import HALF

LSQ_STARTS = ("lsq", "octav")


class LearnedMethod(ClippingMethod):
    """A method whose scalars follow parameters; `solve` gives their start.

    A subclass gives `gradients` as well, and says what a parameter is and how it is trained. Its quantizers ignore what
    is said of an estimator, of when scalars are solved, and of processes: gradients are averaged over these anyway.
    """

    learned = True

    def scalars(self, learned: Tensor, format: Format) -> Tensor:
        """The clipping scalars that a parameter stands for, in its shape.

        Here it is them, or next to nothing where a large step of SGD took it across zero.
        """
        return learned.clamp(min=torch.finfo(learned.dtype).tiny)

    def parameter(self, s: Tensor, format: Format) -> Tensor:
        """The parameter that stands for clipping scalars, in their shape."""
        return s

    @property
    def decays(self) -> bool:
        """Whether the recipe's weight decay holds for the parameters as well."""
        return False

    def weight_decay_factor(self, format: Format) -> float:
        """What the recipe's weight decay is multiplied by for the weights that this quantizes."""
        return 1.0

    def gradient_scale(self, count: int, format: Format) -> float:
        """Factor of a parameter's gradient; count: the elements that share it, of one sample of activations."""
        return 1.0

    @abstractmethod
    def gradients(self, grad: Tensor, x: Tensor, s: Tensor, format: Format) -> tuple[Tensor, Tensor]:
        """Gradients with respect to x, and with respect to the parameter: its own, or of each element.

        Args:
            grad: gradient of the loss with respect to the output, shape and dtype of x.
            x: the input of the forward pass. Beside a half-precision x, PyTorch would round a scalar s to its dtype:
                put x into the compute dtype before it meets s.
            s: its clipping scalar(s), broadcastable to x.
            format: what x was rounded to.

        Returns:
            The first in the dtype of `grad`, the second in `compute_dtype`, in the shape of the parameter or of x, of
            which it is the sum. Of a format with two ends it has a first dimension of 2, as the parameter has.
        """

    def format_of(self, format: Format) -> Format:
        """What is rounded to where a format is asked for.

        Raises:
            ValueError: the method has no gradients for it.
        """
        if not isinstance(format, IntFormat):
            raise ValueError(f"clipping {self.name!r} is for plain integers, not for {format.name}")
        return format

    def quantizer(self, format: Format, *, weight: bool, **how: Any) -> Quantizer:
        """As `ClippingMethod.quantizer`."""
        known = {key: how[key] for key in ("shape", "sign_known") if key in how}
        return LearnedQuantizer(self.format_of(format), self, per_sample=not weight, **known)


@dataclass(frozen=True)
class LSQ(LearnedMethod):
    """Learned step sizes: see the module's head."""

    name: ClassVar[str] = "lsq"

    start: str = "lsq"
    """where step sizes begin: lsq, as published; octav, where the squared error is least. With two ends always octav,
    as LSQ+ has it"""

    def __post_init__(self) -> None:
        if self.start not in LSQ_STARTS:
            raise ValueError(f"start={self.start!r}: must be one of {', '.join(LSQ_STARTS)}")

    def format_of(self, format: Format) -> Format:
        """As it is: plain or affine integers."""
        return format if isinstance(format, IntAffineFormat) else super().format_of(format)

    def solve(self, x: Tensor, format: Format, dim: int | None, call: Call) -> Tensor:
        """The clipping scalar that belongs to the first step size, 2 mean |x| / sqrt(Q_P), or OCTAV's."""
        if isinstance(format, IntAffineFormat) or self.start == "octav":
            return octav(x, format, dim, check=call.check)
        integers = _integers(format)
        factor = 2 * integers.levels_per_scalar / math.sqrt(integers.highest)
        return mean_magnitude(x, format, dim, check=call.check) * factor

    def scalars(self, learned: Tensor, format: Format) -> Tensor:
        """s of step sizes D; low and high of step sizes and lower ends. What SGD took across zero is taken for next to
        nothing."""
        tiny = torch.finfo(learned.dtype).tiny
        if isinstance(format, IntAffineFormat):
            low = learned[1].clamp(max=0) if format.signed else torch.zeros_like(learned[1])
            high = low + learned[0].clamp(min=tiny) * format.levels_per_scalar
            return torch.stack([low, high.clamp(min=0)])
        return learned.clamp(min=tiny) * float(_integers(format).levels_per_scalar)

    def parameter(self, s: Tensor, format: Format) -> Tensor:
        """D of scalars; D and the lower end of two ends."""
        if isinstance(format, IntAffineFormat):
            return torch.stack([format.step(s), s[0]])
        return s / float(_integers(format).levels_per_scalar)

    def weight_decay_factor(self, format: Format) -> float:
        """A quarter at 2 bits, half at 3, as published."""
        return {2: 0.25, 3: 0.5}.get(format.bits, 1.0)

    def gradient_scale(self, count: int, format: Format) -> float:
        """1 / sqrt(N Q_P)."""
        largest = format.highest if isinstance(format, IntAffineFormat) else _integers(format).highest
        return 1 / math.sqrt(max(count, 1) * largest)

    def gradients(self, grad: Tensor, x: Tensor, s: Tensor, format: Format) -> tuple[Tensor, Tensor]:
        """Equation 3 of LSQ; the second with respect to the step size.

        Affine: equations 4 and 5 of LSQ+, the second with respect to the step size and to the lower end.
        """
        grid = format if isinstance(format, IntAffineFormat) else _integers(format)
        of_x, of_step = kernels.backend(x).learned_backward(grad, x, s, grid, rounding=True)
        return of_x, torch.where(s < 0, -of_step, of_step) if format.oriented else of_step


@dataclass(frozen=True)
class PACT(LearnedMethod):
    """Learned clipping scalars of activations, and DoReFa's weights: see the module's head."""

    name: ClassVar[str] = "pact"

    alpha: float = 10.0
    """the first clipping scalar"""

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha}: must be a positive number")

    @property
    def decays(self) -> bool:
        """Yes, as published: it is what brings them down."""
        return True

    def solve(self, x: Tensor, format: Format, dim: int | None, call: Call) -> Tensor:
        """Alpha, whatever x is."""
        return torch.full_like(mean_magnitude(x, format, dim, check=call.check), self.alpha)

    def gradients(self, grad: Tensor, x: Tensor, s: Tensor, format: Format) -> tuple[Tensor, Tensor]:
        """Equation 3 of PACT. Signed, for inputs that no ReLU precedes: the same on both sides."""
        return kernels.backend(x).learned_backward(grad, x, s, _integers(format), rounding=False)

    def format_of(self, format: Format) -> Format:
        """The one of full range of the same integers, as published.

        Raises:
            ValueError: another range was asked for.
        """
        integers = _integers(super().format_of(format))
        if integers.range is Range.ORIENTED:
            raise ValueError(f"range={integers.range}: clipping {self.name!r} has grids of its own, of full range")
        return integers.with_range(Range.FULL)

    def quantizer(self, format: Format, *, weight: bool, **how: Any) -> Quantizer:
        """As `ClippingMethod.quantizer`; a weight's has one scalar for all of it, as published."""
        if weight:
            return DoReFa().quantizer(self.format_of(format), weight=True)
        return super().quantizer(format, weight=False, **how)


def _integers(format: Format) -> IntFormat:
    if not isinstance(format, IntFormat):
        raise ValueError(f"learned scalars are for plain integers, not for {format.name}")
    return format


class LearnedQuantizer(Quantizer):
    """A quantizer whose scalars are parameters: calibrated once for their start, then trained.

    As a static Quantizer, but in training and evaluation `s` follows the parameter `learned`, in the shape of s: step
    sizes or clipping scalars, as the method says, in units of x. It is never less than float32 either; its gradient is
    computed and summed in float32 (float64 for float64), whatever x is stored in.

    Args:
        format, method, shape, sign_known: as of `Quantizer`.
        per_sample: x is a batch of activations: the elements of one sample count for the scale of the gradient. Samples
            lie along the first dimension, unless `features` says how many elements one has.
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
        """ "learned"."""
        return "learned"

    def _quantize(self, x: Tensor, s: Tensor) -> Tensor:
        """Differentiable with respect to `learned` as well."""
        scale = self.method.gradient_scale(self._count(x), self.format)
        out: Tensor = _Learned.apply(x, self.learned, s, self.format, self.method, scale)
        return out

    def _count(self, x: Tensor) -> int:
        """Elements of a sample, or of the weight's share that has one parameter."""
        if self.per_sample and self.features is not None:
            return self.features
        shares = x.shape[0] if self.per_sample and x.ndim else self.learned.numel() // self.format.parts
        return x.numel() // max(shares, 1)

    def _averaged(self) -> tuple[Tensor, ...]:
        return *super()._averaged(), self.learned

    @torch.no_grad()
    def _scalars(self, x: Tensor) -> Tensor:
        self._constant_scalars()  # complains where there are none
        self.s.copy_(self.method.scalars(self.learned, self.format))
        if self.training and self.orientation is not None and isinstance(self.format, IntFormat):
            self._point(oriented(x, self.s, self.format, self.orientation))
        return self.scalars.clone()

    @torch.no_grad()
    def assign(self, s: Tensor, batches: int = 1) -> None:
        """As `Quantizer.assign`: it is where learning starts."""
        super().assign(s, batches)
        self.learned.copy_(self.method.parameter(self.s, self.format))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        learned = self.learned.data
        super()._apply(fn, recurse)
        if self.learned.dtype in HALF:  # as with the scalars of every Quantizer
            self.learned.data = learned.to(self.learned.device)
        return self

    def _loaded(self, prefix: str, missing_keys: list[str]) -> None:
        self.static.fill_(1)  # whatever the scalars were: here they are learned
        self._know(static=True)
        if f"{prefix}learned" in missing_keys:  # the scalars of another method are a start as good as any
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
        refuse_double_backward()
        x, learned, s = ctx.saved_tensors
        of_x, of_learned = ctx.method.gradients(grad, x, s, ctx.format)
        if of_learned.shape != learned.shape:
            ends = of_learned if ctx.format.parts > 1 else of_learned[None]
            shape = learned.shape[ctx.format.parts > 1 :]
            of_learned = torch.stack([end.sum_to_size(shape) for end in ends]).view_as(learned)
        of_learned = of_learned * ctx.scale
        return of_x, of_learned.to(learned.dtype), None, None, None, None
