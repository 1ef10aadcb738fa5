"""Clipping scalars that are learned with the weights: the rivals LSQ and PACT.

| name | what is learned | its start               | its gradient                                  | its weight decay |
|------|-----------------|-------------------------|-----------------------------------------------|------------------|
| lsq  | step size D     | 2 mean abs(x)/sqrt(Q_P) | code - x / D inside, the end code outside,    | none             |
|      |                 |                         | all times 1 / sqrt(N Q_P)                     |                  |
| pact | clipping scalar | 10                      | 1 above it (-1 below its negative), 0 else    | that of weights  |

LSQ: Esser et al., "Learned Step Size Quantization", ICLR 2020: for weights and activations. N is the number of weights
that share D, or the number of features of one sample; Q_P the largest code. At 3 and 2 bits it trains the weights
themselves with a half and a quarter of the weight decay.

PACT: Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks", 2018: for activations. Its
weights go to DoReFa, which amounts to max-scaling with STE where weights are small (tanh(w) is w) and the network's
scale is kept; that is what weights get here.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.quant import kernels
from qat_runner.quant.clipping import mean_magnitude
from qat_runner.quant.grid import Grid
from qat_runner.quant.quantizer import Quantizer

LEARNED = ("lsq", "pact")
"""The names of the methods."""


def lsq_start(x: Tensor, bits: int, signed: bool = True, dim: int | None = None, *, check: bool = True) -> Tensor:
    """The clipping scalar that belongs to LSQ's first step size, 2 mean |x| / sqrt(Q_P); as `clipping.octav` else."""
    grid = Grid(bits, signed)
    return mean_magnitude(x, signed, dim, check=check) * (2 * grid.levels_per_scalar / math.sqrt(grid.highest))


def pact_start(
    x: Tensor, bits: int, signed: bool = True, dim: int | None = None, alpha: float = 10.0, *, check: bool = True
) -> Tensor:
    """PACT's first clipping scalar, whatever x is.

    Raises:
        ValueError: alpha is not positive and finite.
    """
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha}: must be a positive number")
    return torch.full_like(mean_magnitude(x, signed, dim, check=check), alpha)


class LearnedQuantizer(Quantizer):
    """A quantizer whose scalars are parameters: calibrated once for their start, then trained.

    As a static Quantizer, but in training and evaluation `s` follows the parameter `learned`, which holds step sizes
    (lsq) or clipping scalars (pact), in units of x, in the shape of s.

    Args:
        method: "lsq" or "pact".
        bits, signed, shape: as of `Quantizer`.
        per_sample: x is a batch of activations: the elements of one sample count for LSQ's gradient scale.
        **options: of the start: alpha=10.0 for pact.
    """

    learned: nn.Parameter

    def __init__(
        self,
        method: str,
        bits: int,
        signed: bool | None = True,
        shape: Sequence[int] = (),
        per_sample: bool = False,
        **options: Any,
    ) -> None:
        if method not in LEARNED:
            raise ValueError(f"method={method!r}: must be one of {', '.join(LEARNED)}")
        start = {"lsq": lsq_start, "pact": pact_start}[method]
        super().__init__(bits, signed, shape, start, "pwl", dynamic=False, **options)
        self.method, self.per_sample, self.clipping_name = method, per_sample, method
        self.learned = nn.Parameter(torch.zeros(tuple(shape)))

    @property
    def weight_decay_factor(self) -> float:
        """What the recipe's weight decay is multiplied by for the weights that this quantizes (LSQ)."""
        return {2: 0.25, 3: 0.5}.get(self.bits, 1.0) if self.method == "lsq" else 1.0

    @property
    def decays(self) -> bool:
        """Whether the recipe's weight decay holds for `learned` as well."""
        return self.method == "pact"

    @property
    def _per_scalar(self) -> float:
        """s / learned."""
        return float(Grid(self.bits, self.signed).levels_per_scalar) if self.method == "lsq" else 1.0

    def _quantize(self, x: Tensor, s: Tensor) -> Tensor:
        """Differentiable with respect to `learned` as well."""
        count = x[0].numel() if self.per_sample else x.numel() // max(self.learned.numel(), 1)
        grid = Grid(self.bits, self.signed)
        out: Tensor = _Learned.apply(x, self.learned, s, grid, self.method, 1 / math.sqrt(max(count, 1) * grid.highest))
        return out

    @torch.no_grad()
    def _scalars(self, x: Tensor) -> Tensor:
        super()._scalars(x)  # complains where there are none
        positive = self.learned.clamp(min=torch.finfo(self.learned.dtype).tiny)  # a large step of SGD may cross zero
        self.s.copy_(positive * self._per_scalar)
        return self.s.clone()

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """As `Quantizer.calibrating`; the result is where learning starts."""
        with super().calibrating():
            yield
        with torch.no_grad():
            self.learned.copy_(self.s / self._per_scalar)

    def _loaded(self, prefix: str, missing_keys: list[str]) -> None:
        if f"{prefix}learned" in missing_keys:  # the scalars of another method are a start as good as any
            missing_keys.remove(f"{prefix}learned")
            with torch.no_grad():
                self.learned.copy_(self.s / self._per_scalar)


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, learned: Tensor, s: Tensor, grid: Grid, method: str, gradient_scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, learned, s)
        ctx.grid, ctx.method, ctx.gradient_scale = grid, method, gradient_scale
        return kernels.backend(x).fake_quantize(x, s, grid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, learned, s = ctx.saved_tensors
        of_x, of_learned = (_lsq if ctx.method == "lsq" else _pact)(grad, x, s, ctx.grid)
        of_learned = of_learned.float().sum_to_size(learned.shape)
        if ctx.method == "lsq":
            of_learned = of_learned * ctx.gradient_scale
        return of_x, of_learned, None, None, None, None


def _lsq(grad: Tensor, x: Tensor, s: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Gradients with respect to x, and elementwise with respect to the step size (equation 3 of LSQ)."""
    v = x / (s / grid.levels_per_scalar)
    inside = (v > grid.lowest) & (v < grid.highest)
    code = v.round().clamp(grid.lowest, grid.highest)
    return grad * inside, grad * (code - torch.where(inside, v, 0.0))


def _pact(grad: Tensor, x: Tensor, s: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Gradients with respect to x, and elementwise with respect to the clipping scalar (equation 3 of PACT).

    Signed, for inputs that no ReLU precedes: the same on both sides.
    """
    above, below = x >= s, x <= (-s if grid.signed else torch.zeros_like(s))
    inside = grad.masked_fill(above | below, 0)
    return inside, grad * (above.to(grad.dtype) - (below & grid.signed).to(grad.dtype))
