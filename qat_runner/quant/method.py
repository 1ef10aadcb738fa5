"""Base class of clipping methods, which find clipping scalars, and the information about a call that they receive."""

from __future__ import annotations  # configs are validated against methods, which must not import PyTorch

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from qat_runner.quant.formats import Format
from qat_runner.quant.limits import options_of, with_options

if TYPE_CHECKING:
    from torch import Tensor

    from qat_runner.quant import Quantizer
    from qat_runner.quant.kernels.cost import Cost
    from qat_runner.quant.pool import Pool

EVAL_MODES = ("dynamic", "running", "last")
"""Modes of a dynamic quantizer in eval(); see `Quantizer`."""


class Call(NamedTuple):
    """What a clipping method receives about a call in addition to the tensor."""

    check: bool = True
    """raise ValueError on NaN and infinity, in evaluation and calibration; false in training, where nothing waits for
    the device"""
    start: Tensor | None = None
    """scalars of the previous call, in the shape of the result; only for methods with `warm`"""
    training: bool = False
    """whether a call with a similar tensor will follow soon, so that an almost converged result suffices"""
    pool: Pool | None = None
    """the parts, of which x is one, that share scalars; only for methods with `pools`. None if x is the whole tensor"""
    orientation: Tensor | None = None
    """in an oriented format, numbers with the signs of the scalars of the previous call, in the shape of the result"""


class ClippingMethod(ABC):
    """Finds clipping scalars.

    A method is a frozen dataclass. Its fields are its options, which are validated when it is created. A subclass
    defines `name` and `solve`, and declares its other capabilities in class variables. If the subclass is registered in
    `methods.METHODS`, configs can use its name.
    """

    name: ClassVar[str]
    """name in configs, records and messages"""
    warm: ClassVar[bool] = False
    """whether `solve` uses `Call.start`"""
    pools: ClassVar[bool] = False
    """whether `solve` supports `Call.pool`, for tensors that are distributed over several processes"""
    learned: ClassVar[bool] = False
    """whether scalars are trained parameters; `solve` then returns their initial values"""

    @abstractmethod
    def solve(self, x: Tensor, format: Format, dim: int | None, call: Call) -> Tensor:
        """Return the clipping scalars of a tensor.

        Args:
            x: any shape and floating dtype; zeros and empty tensors occur.
            format: number format to round to; if it is unsigned, magnitudes are max(x, 0).
            dim: None for one scalar, in shape []; or a dimension for one scalar per index of it, with the others kept
                at size 1.
            call: see `Call`.

        Returns:
            s in units of x, not negative, without a gradient, float64 for float64 and float32 otherwise; 0 for a row
            that is all zero. In oriented formats, the sign is determined afterwards, in the same way for all methods.

        Raises:
            ValueError: if x contains NaN or infinity and `call.check` is true.
        """

    def in_training(self, format: Format, warm: bool) -> tuple[Cost, int, float] | None:
        """Return the objective of a training step, if the faster `kernels.octav_and_quantize` can replace `solve`.

        Args:
            format: number format to round to.
            warm: whether there are scalars of a previous call.

        Returns:
            The cost, the maximum number of reads, and the tolerance; or None if `solve` does something else.
        """
        return None

    def quantizer(self, format: Format, *, weight: bool, **how: Any) -> Quantizer:
        """Return a quantizer that uses this method.

        Args:
            format: number format to round to.
            weight: whether it quantizes a weight; otherwise an activation.
            **how: other arguments of `Quantizer`.
        """
        from qat_runner.quant import Quantizer

        return Quantizer(format, self, **how)

    def token_quantizer(self, format: Format, **how: Any) -> Quantizer:
        """Return a quantizer for an activation that uses this method, with one scalar per token.

        Args:
            format: number format to round to.
            **how: other arguments of `TokenQuantizer`.

        Raises:
            ValueError: if the method is learned, since no scalar of a token lasts beyond a call.
        """
        from qat_runner.quant import TokenQuantizer

        if self.learned:
            raise ValueError(f"clipping {self.name!r} learns its scalars, and scalars per token cannot be learned")
        return TokenQuantizer(format, self, **how)

    @property
    def options(self) -> dict[str, Any]:
        """The options by name."""
        return options_of(self)

    def __str__(self) -> str:
        """Return the name, with all options that differ from their defaults: "octav", "percentile(q=99.9)"."""
        return with_options(self.name, self)
