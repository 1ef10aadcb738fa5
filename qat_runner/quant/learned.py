"""Clipping scalars that are learned with the weights: the rivals LSQ and PACT.

| name | what is learned | its start               | its gradient                                  | its weight decay |
|------|-----------------|-------------------------|-----------------------------------------------|------------------|
| lsq  | step size D     | 2 mean abs(x)/sqrt(Q_P) | code - x / D inside, the end code outside,    | none             |
|      |                 |                         | all times 1 / sqrt(N Q_P)                     |                  |
| pact | clipping scalar | 10                      | 1 from it on (-1 to its negative), 0 else     | that of weights  |

LSQ: Esser et al., "Learned Step Size Quantization", ICLR 2020: for weights and activations. N is the number of weights
that share D, or the number of features of one sample; Q_P the largest code. At 3 and 2 bits it trains the weights
themselves with a half and a quarter of the weight decay.

PACT: Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks", 2018, arXiv 1805.06085:
for activations, one alpha a layer. They are clipped to [0, alpha] (equation 1) and rounded to 2^B - 1 steps that end
at alpha (equation 2: the closed `Grid`). Alpha's gradient is that of equation 3, straight through the rounding. Alpha
starts large, and an L2 penalty as strong as that of the weights brings it down. Weights are DoReFa's
(`quant.dorefa`).

Where this departs from the paper:
- First and last layers, which PACT and DoReFa leave in full precision, get `first_last_bits`, as under all methods
  here.
- PACT takes the place of a ReLU, so an input is never negative there. One that may be has the symmetric extension: it
  is clipped to [-alpha, alpha] and rounded to steps of alpha / (2^(B-1) - 1), and both ends count for alpha.
- The start is 10, as in reimplementations; what matters to the paper is that it be large.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.quant import kernels
from qat_runner.quant.clipping import mean_magnitude
from qat_runner.quant.grid import Grid
from qat_runner.quant.kernels.eager import compute_dtype, in_steps
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
    (lsq) or clipping scalars (pact), in units of x, in the shape of s. It is never less than float32 either; its
    gradient is computed and summed in float32 (float64 for float64), whatever x is stored in.

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
    def mode(self) -> str:
        """ "learned"."""
        return "learned"

    @property
    def weight_decay_factor(self) -> float:
        """What the recipe's weight decay is multiplied by for the weights that this quantizes (LSQ)."""
        return {2: 0.25, 3: 0.5}.get(self.bits, 1.0) if self.method == "lsq" else 1.0

    @property
    def decays(self) -> bool:
        """Whether the recipe's weight decay holds for `learned` as well."""
        return self.method == "pact"

    @property
    def format(self) -> Grid:
        """The grid that values come to lie on."""
        return Grid(self.bits, self.signed, closed=self.method == "pact")

    @property
    def _per_scalar(self) -> float:
        """s / learned."""
        return float(self.format.levels_per_scalar) if self.method == "lsq" else 1.0

    def _quantize(self, x: Tensor, s: Tensor) -> Tensor:
        """Differentiable with respect to `learned` as well."""
        count = x[0].numel() if self.per_sample else x.numel() // max(self.learned.numel(), 1)
        grid = self.format
        out: Tensor = _Learned.apply(x, self.learned, s, grid, self.method, 1 / math.sqrt(max(count, 1) * grid.highest))
        return out

    def _averaged(self) -> tuple[Tensor, ...]:
        return *super()._averaged(), self.learned

    @torch.no_grad()
    def _scalars(self, x: Tensor) -> Tensor:
        self._constant_scalars()  # complains where there are none
        positive = self.learned.clamp(min=torch.finfo(self.learned.dtype).tiny)  # a large step of SGD may cross zero
        self.s.copy_(positive * self._per_scalar)
        return self.s.clone()

    @torch.no_grad()
    def assign(self, s: Tensor, batches: int = 1) -> None:
        """As `Quantizer.assign`: it is where learning starts."""
        super().assign(s, batches)
        self.learned.copy_(self.s / self._per_scalar)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LearnedQuantizer":
        learned = self.learned.data
        super()._apply(fn, recurse)
        if self.learned.dtype in (torch.float16, torch.bfloat16):  # as with the scalars of every Quantizer
            self.learned.data = learned.to(self.learned.device)
        return self

    def _loaded(self, prefix: str, missing_keys: list[str]) -> None:
        self.static.fill_(1)  # whatever the scalars were: here they are learned
        self._know(static=True)
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
        of_learned = of_learned.sum_to_size(learned.shape)
        if ctx.method == "lsq":
            of_learned = of_learned * ctx.gradient_scale
        return of_x, of_learned.to(learned.dtype), None, None, None, None


# Below, x is put into the compute dtype before it meets s: beside a half-precision x, PyTorch would round a scalar s to
# the dtype of x.


def _lsq(grad: Tensor, x: Tensor, s: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Gradients with respect to x, and elementwise with respect to the step size (equation 3 of LSQ).

    Args:
        grad: gradient of the loss with respect to the output, shape and dtype of x.
        x: the input of the forward pass.
        s: its clipping scalar(s), broadcastable to x.
        grid: on which x was rounded.

    Returns:
        The first in the dtype of `grad`, the second in `compute_dtype`.
    """
    v = in_steps(x, s, grid)
    inside = (v > grid.lowest) & (v < grid.highest)
    code = v.round().clamp(grid.lowest, grid.highest)
    return grad * inside, grad.to(v.dtype) * (code - torch.where(inside, v, 0.0))


def _pact(grad: Tensor, x: Tensor, s: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Gradients with respect to x, and elementwise with respect to the clipping scalar (equation 3 of PACT); as `_lsq`.

    Signed, for inputs that no ReLU precedes: the same on both sides.
    """
    dtype = compute_dtype(x)
    x, s = x.to(dtype), s.to(dtype)
    above, below = x >= s, x <= (-s if grid.signed else torch.zeros_like(s))
    inside = grad.masked_fill(above | below, 0)
    return inside, grad.to(dtype) * (above.to(dtype) - (below & grid.signed).to(dtype))
