"""A clipping method: what finds clipping scalars, and what of a call it may know."""

from __future__ import annotations  # configs are checked by methods, and that must not wait for PyTorch

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from qat_runner.quant.formats import Format
from qat_runner.quant.limits import options_of

if TYPE_CHECKING:
    from torch import Tensor

    from qat_runner.quant import Quantizer
    from qat_runner.quant.kernels.cost import Cost
    from qat_runner.quant.pool import Pool

EVAL_MODES = ("dynamic", "running", "last")
"""What a dynamic quantizer does in eval()."""


class Call(NamedTuple):
    """What a clipping method may know of the call that it solves for, beside the tensor."""

    check: bool = True
    """refuse NaN and infinity with a ValueError, in evaluation and calibration; false in training, where nothing waits
    for the device"""
    start: Tensor | None = None
    """the scalars of the call before, in the shape of the result; only for a method that says `warm`"""
    training: bool = False
    """the next call comes soon, with a similar tensor: close to converged is enough"""
    pool: Pool | None = None
    """what x is a part of; only for a method that says `pools`. None: it is all there is"""
    orientation: Tensor | None = None
    """in an oriented format, numbers with the signs of the scalars of the call before, in the shape of the result"""


class ClippingMethod(ABC):
    """How clipping scalars are found: its options are the fields of a frozen dataclass, checked when it is made.

    A subclass gives `name` and `solve`, and says what else it can do. Registered (`methods.METHODS`), it has a name in
    configs as well.
    """

    name: ClassVar[str]
    """what configs, records and messages call it"""
    warm: ClassVar[bool] = False
    """whether it makes use of a start"""
    pools: ClassVar[bool] = False
    """whether it can solve for tensors that lie on several processes together"""
    learned: ClassVar[bool] = False
    """whether scalars are parameters that are trained; `solve` gives their start"""

    @abstractmethod
    def solve(self, x: Tensor, format: Format, dim: int | None, call: Call) -> Tensor:
        """The clipping scalars of a tensor.

        Args:
            x: any shape and floating dtype; zeros and empty tensors occur.
            format: what will be rounded to; where it is unsigned, magnitudes are max(x, 0).
            dim: None for one scalar, shape []; a dimension for one an index of it, the others kept at size 1.
            call: see `Call`.

        Returns:
            s in units of x, not negative, without a gradient, float64 for float64 and float32 else; 0 for a row that
            is all zero. In an oriented format its sign is found after it, for all methods alike.

        Raises:
            ValueError: NaN or infinity in x under `call.check`.
        """

    def in_training(self, format: Format, warm: bool) -> tuple[Cost, int, float] | None:
        """What a training step minimizes, if `solve` does what `kernels.octav_and_quantize` does, which is faster.

        Args:
            format: what is rounded to.
            warm: there are scalars of the call before.

        Returns:
            The cost, how many reads there are at most, and the tolerance; or None, where `solve` is something else.
        """
        return None

    def quantizer(self, format: Format, *, weight: bool, **how: Any) -> Quantizer:
        """What quantizes a tensor with this method.

        Args:
            format: what values are rounded to.
            weight: it is a weight, and no activation.
            **how: as of `Quantizer`.
        """
        from qat_runner.quant import Quantizer

        return Quantizer(format, self, **how)

    def token_quantizer(self, format: Format, **how: Any) -> Quantizer:
        """What quantizes an activation with this method, with a scalar for each token.

        Args:
            format: what values are rounded to.
            **how: as of `TokenQuantizer`.

        Raises:
            ValueError: it is learned: no token is there for long enough.
        """
        from qat_runner.quant import TokenQuantizer

        if self.learned:
            raise ValueError(f"clipping {self.name!r} learns its scalars, and tokens have none that last")
        return TokenQuantizer(format, self, **how)

    @property
    def options(self) -> dict[str, Any]:
        """Its options, by name."""
        return options_of(self)
