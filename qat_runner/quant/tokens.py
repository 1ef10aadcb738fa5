"""Quantization of activations with one clipping scalar per token."""

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
from qat_runner.quant.tensors import is_transient, recording

NOT_CONSTANT = "has one clipping scalar per token, solved on each call, so no scalar can be constant"
"""The reason in error messages why a token quantizer cannot be static."""


class TokenQuantizer(Quantizer):
    """Fake-quantizes each token of a tensor [..., C] with a scalar that is solved on its C values alone.

    The result for a token does not depend on the other tokens, neither in training nor in evaluation. No scalars are
    remembered: the state has a sign but no scalars, and the quantizer is never static.

    Args:
        format: number format to round to.
        method: clipping method; not a learned one.
        gradient: a gradient estimator or its name.
        sign_known: if false, the sign of the format is undecided; that of `format` is used until `decide_sign`.
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
        """Always true, even after loading the state of a static quantizer."""
        return True

    @property
    def has_scalars(self) -> bool:
        """Always false: scalars do not outlive a call."""
        return False

    def rows(self, x: Tensor) -> Tensor:
        """Reshape x from [..., C] to [tokens, C]."""
        return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])

    def _called(self, x: Tensor) -> Tensor:
        self._calls.holds = False
        rows = self.rows(x)
        s = self._scalars_of_tokens(x, rows)
        if not is_transient():
            self._calls.last_s = s
        return fake_quantize(rows, s, self.format, self.gradient).view(x.shape)

    def _scalars_of_tokens(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return scalars [tokens, 1], or [2, tokens, 1] for two clipping bounds.

        If another quantizer has just solved for the same tensor, its scalars are reused.
        """
        if recording():  # also under transforms of torch.func
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
        """Return x quantized with s, as from `scalars_of`; see `Quantizer.quantized`."""
        rows = self.rows(x)
        return kernels.backend(rows).fake_quantize(rows, s, format or self.format).view(x.shape)

    def scalars_of(self, x: Tensor, check: bool = True, format: Format | None = None) -> Tensor:
        """Return scalars [tokens, 1], or [2, tokens, 1] for a format with two bounds; see `Quantizer.scalars_of`."""
        return super().scalars_of(self.rows(x), check, format)

    def assign(self, s: Tensor, batches: int = 1) -> NoReturn:
        """Not supported, as a token quantizer has no constant scalars.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self.name} {NOT_CONSTANT}")
