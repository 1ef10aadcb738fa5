"""A gradient estimator: what the backward pass of fake quantization does, since rounding has no derivative of use."""

from __future__ import annotations  # configs are checked by estimators, and that must not wait for PyTorch

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qat_runner.quant.limits import options_of

if TYPE_CHECKING:
    from torch import Tensor

    from qat_runner.quant.formats import Format, IntFormat


class Estimator(ABC):
    """How gradients pass through fake quantization: its options are the fields of a frozen dataclass, checked when it
    is made.

    A subclass gives `name` and `backward`, in plain PyTorch, which torch.compile takes in. Registered (`GRADIENTS`), it
    has a name in configs as well.
    """

    name: ClassVar[str]
    """what configs, records and messages call it"""
    straight: ClassVar[bool] = False
    """whether gradients pass as they are: neither x nor s is kept for the backward pass, which is not called"""
    in_kernels: ClassVar[bool] = False
    """whether the kernels know it by its name"""

    @abstractmethod
    def backward(self, grad: Tensor, x: Tensor, s: Tensor, format: Format) -> Tensor:
        """The gradient with respect to x; called without gradients.

        Args:
            grad: gradient of the loss with respect to the output, shape and dtype of x; not to be written to.
            x: the input of the forward pass, any shape and floating dtype.
            s: its clipping scalar(s), broadcastable to x, in the compute dtype of x or wider; 0 for a row of zeros.
                Beside a half-precision x, PyTorch would round a scalar s to its dtype: put x into the dtype of s first.
            format: what x was rounded to, which has the clipping interval, `format.ends(s)`.

        Returns:
            Shape and dtype of `grad`.
        """

    def backward_all(
        self, grads: Sequence[Tensor], xs: Sequence[Tensor], ss: Sequence[Tensor], format: IntFormat
    ) -> list[Tensor]:
        """`backward` of several tensors that share a format, plain integers: weights that are quantized together."""
        return [self.backward(*part, format) for part in zip(grads, xs, ss, strict=True)]

    @property
    def options(self) -> dict[str, Any]:
        """Its options, by name."""
        return options_of(self)

    def __str__(self) -> str:
        """Its name, with the options that are not the usual: "ewgs", "ewgs(delta=0.02)"."""
        usual: dict[str, Any] = {field.name: field.default for field in fields(self)} if is_dataclass(self) else {}
        said = [f"{name}={value}" for name, value in self.options.items() if value != usual[name]]
        return f"{self.name}({', '.join(said)})" if said else self.name
