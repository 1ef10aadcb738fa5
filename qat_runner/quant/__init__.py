"""Core of the package: clipping scalars, fake quantization and its gradients, quantization noise.

The only third-party package that it imports is torch, so it can be used by itself:

    from qat_runner.quant import octav, fake_quantize

    s = octav(weight, 4, dim=0)                      # [K, 1, 1, 1]: one clipping scalar per output channel
    q = fake_quantize(weight, s, 4, gradient="mad")  # same shape and dtype as weight

Unless another source is named, equations, tables and sections cited in this package are those of Sakr et al., "Optimal
Clipping and Magnitude-aware Differentiation for Improved Quantization-aware Training", ICML 2022.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat_runner.quant.clipping import maximum, mse_sweep, newton_step, octav, percentile
    from qat_runner.quant.dorefa import DoReFaQuantizer
    from qat_runner.quant.estimators import fake_quantize
    from qat_runner.quant.formats import (
        BITS,
        FORMATS,
        Format,
        IntAffineFormat,
        IntFormat,
        MidriseFormat,
        Range,
        StepFormat,
        as_format,
    )
    from qat_runner.quant.gradients import GRADIENTS, Estimator, gradient_estimator
    from qat_runner.quant.learned import LSQ, PACT, LearnedMethod, LearnedQuantizer
    from qat_runner.quant.method import EVAL_MODES, Call, ClippingMethod
    from qat_runner.quant.methods import METHODS, Maximum, MseSweep, Octav, Percentile, clipping_method
    from qat_runner.quant.noise import Noise, clipped_fraction, expected_mse, measure, mse, noise_of, sqnr_db
    from qat_runner.quant.orienting import oriented
    from qat_runner.quant.quantizer import NotCalibratedError, Quantizer
    from qat_runner.quant.tokens import TokenQuantizer

__all__ = [
    "BITS",
    "EVAL_MODES",
    "FORMATS",
    "GRADIENTS",
    "LSQ",
    "METHODS",
    "PACT",
    "Call",
    "ClippingMethod",
    "DoReFaQuantizer",
    "Estimator",
    "Format",
    "IntAffineFormat",
    "IntFormat",
    "LearnedMethod",
    "LearnedQuantizer",
    "Maximum",
    "MidriseFormat",
    "MseSweep",
    "Noise",
    "NotCalibratedError",
    "Octav",
    "Percentile",
    "Quantizer",
    "Range",
    "StepFormat",
    "TokenQuantizer",
    "as_format",
    "clipped_fraction",
    "clipping_method",
    "expected_mse",
    "fake_quantize",
    "gradient_estimator",
    "maximum",
    "measure",
    "mse",
    "mse_sweep",
    "newton_step",
    "noise_of",
    "octav",
    "oriented",
    "percentile",
    "sqnr_db",
]

_MODULES = (
    *("formats", "gradients", "method", "methods"),  # these do not import PyTorch
    *("clipping", "dorefa", "estimators", "learned", "noise", "orienting", "quantizer", "tokens"),
)
"""The modules that define these names, in the order of the search."""


def __getattr__(name: str) -> Any:
    """Import names on first access, so that a config can be validated, or rejected, without loading PyTorch."""
    if name in __all__:
        for module in _MODULES:
            found = import_module(f"{__name__}.{module}")
            if hasattr(found, name):
                globals()[name] = getattr(found, name)
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
