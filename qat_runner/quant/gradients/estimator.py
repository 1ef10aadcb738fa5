"""Base class of gradient estimators: the backward pass of fake quantization, as rounding has no useful derivative."""

from __future__ import annotations  # configs are validated against estimators, which must not import PyTorch

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from qat_runner.quant.limits import options_of, with_options

if TYPE_CHECKING:
    from torch import Tensor

    from qat_runner.quant.formats import Format, IntFormat


class Estimator(ABC):
    """Determines how gradients pass through fake quantization.

    An estimator is a frozen dataclass. Its fields are its options, which are validated when it is created. A subclass
    defines `name` and `backward`; written in plain PyTorch, `backward` works with torch.compile. If the subclass is
    registered in `GRADIENTS`, configs can use its name.
    """

    name: ClassVar[str]
    """name in configs, records and messages"""
    straight: ClassVar[bool] = False
    """whether gradients pass unchanged; x and s are then not saved for the backward pass, and `backward` not called"""
    in_kernels: ClassVar[bool] = False
    """whether the kernels implement the estimator, under its name"""

    @abstractmethod
    def backward(self, grad: Tensor, x: Tensor, s: Tensor, format: Format) -> Tensor:
        """Return the gradient with respect to x. Called under `torch.no_grad()`.

        Args:
            grad: gradient of the loss with respect to the output, shape and dtype of x; must not be modified.
            x: the input of the forward pass, any shape and floating dtype.
            s: clipping scalar(s) of x, broadcastable to x, in the compute dtype of x or wider; 0 for a row of zeros.
                Convert x to the dtype of s first: in an operation with a half-precision x, PyTorch would round a
                zero-dimensional s to the dtype of x.
            format: the format that x was rounded to; `format.clipping_bounds(s)` is its clipping interval.

        Returns:
            A tensor in the shape and dtype of `grad`.
        """

    def backward_all(
        self, grads: Sequence[Tensor], xs: Sequence[Tensor], ss: Sequence[Tensor], format: IntFormat
    ) -> list[Tensor]:
        """Apply `backward` to several tensors with the same plain integer format: weights quantized together."""
        return [self.backward(*part, format) for part in zip(grads, xs, ss, strict=True)]

    @property
    def options(self) -> dict[str, Any]:
        """The options by name."""
        return options_of(self)

    def __str__(self) -> str:
        """Return the name, with all options that differ from their defaults: "ewgs", "ewgs(delta=0.02)"."""
        return with_options(self.name, self)
