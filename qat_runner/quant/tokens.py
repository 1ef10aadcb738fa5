"""Activations whose every token has a clipping scalar of its own."""

import math
from typing import NoReturn

import torch
from torch import Tensor

from qat_runner.quant import kernels
from qat_runner.quant.estimators import fake_quantize
from qat_runner.quant.formats import Format
from qat_runner.quant.gradients import Estimator
from qat_runner.quant.method import Call, ClippingMethod
from qat_runner.quant.quantizer import LATEST, Quantizer
from qat_runner.quant.tensors import fleeting, recording

NOT_CONSTANT = "has a clipping scalar a token, solved as it comes: none of them is constant"
"""What errors say of it."""


class TokenQuantizer(Quantizer):
    """Fake-quantizes each token of a tensor [..., C] with a scalar that is solved on its C values alone.

    So a token comes out the same whatever it stands beside, in training and in evaluation. Nothing is remembered: its
    state has a sign and no scalars, and it is never static.

    Args:
        format: what values are rounded to.
        method: how scalars are found; not a learned one.
        gradient: an estimator, or its name.
        sign_known: false leaves the sign of the format open (the format's until `decide_sign`).
    """

    per_token = True

    def __init__(
        self,
        format: Format | int,
        method: ClippingMethod,
        *,
        gradient: str | Estimator = "mad",
        sign_known: bool = True,
    ) -> None:
        super().__init__(format, method, gradient=gradient, sign_known=sign_known)
        self.granularity = "token"
        self.dim = 0

    @property
    def dynamic(self) -> bool:
        """It is, whatever the state of another quantizer says that is loaded into it."""
        return True

    @property
    def has_scalars(self) -> bool:
        """None that outlive a call."""
        return False

    def rows(self, x: Tensor) -> Tensor:
        """x, [..., C] -> [tokens, C]."""
        return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])

    def _called(self, x: Tensor) -> Tensor:
        self._calls.holds = False
        rows = self.rows(x)
        s = self._scalars_of_tokens(x, rows)
        if not fleeting():
            self._calls.last_s = s
        return fake_quantize(rows, s, self.format, self.gradient).view(x.shape)

    def _scalars_of_tokens(self, x: Tensor, rows: Tensor) -> Tensor:
        """Scalars [tokens, 1], or of two ends [2, tokens, 1]; of a tensor that another one has solved, its."""
        if recording():  # transforms are among what does
            return self._solve(rows, Call(check=False))
        if not self.training:
            return self._solve(rows, Call(check=self.checks))
        how = self.method, self.format, "token", torch.cuda.current_stream(x.device) if x.is_cuda else None
        s = LATEST.find(self, x, how)
        if s is None:
            s = self._solve(rows, Call(check=False, training=True))
            LATEST.note(self, x, how, s)
        return s

    @torch.no_grad()
    def quantized(self, x: Tensor, s: Tensor, format: Format | None = None) -> Tensor:
        """As `Quantizer.quantized`; s as of `scalars_of`."""
        rows = self.rows(x)
        return kernels.backend(rows).fake_quantize(rows, s, format or self.format).view(x.shape)

    def scalars_of(self, x: Tensor, check: bool = True, format: Format | None = None) -> Tensor:
        """As `Quantizer.scalars_of`: [tokens, 1], or [2, tokens, 1] of a format with two ends."""
        return super().scalars_of(self.rows(x), check, format)

    def assign(self, s: Tensor, batches: int = 1) -> NoReturn:
        """There is nothing to assign to.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self.name} {NOT_CONSTANT}")
