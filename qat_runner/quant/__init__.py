"""The heart: clipping scalars, fake quantization and its gradients, quantization noise.

Imports torch alone, so it can be used by itself:

    from qat_runner.quant import octav, fake_quantize

    s = octav(weight, bits=4, dim=0)                      # [K, 1, 1, 1]: one clipping scalar per output channel
    q = fake_quantize(weight, s, bits=4, gradient="mad")  # same shape and dtype as weight

Equations, tables and sections cited in this package are those of Sakr et al., "Optimal Clipping and
Magnitude-aware Differentiation for Improved Quantization-aware Training", ICML 2022.
"""

from qat_runner.quant.clipping import CLIPPING_METHODS, maximum, mse_sweep, newton_step, octav, percentile
from qat_runner.quant.dorefa import DoReFaQuantizer
from qat_runner.quant.estimators import GRADIENTS, fake_quantize
from qat_runner.quant.grid import BITS, Grid
from qat_runner.quant.learned import LEARNED, LearnedQuantizer
from qat_runner.quant.noise import Noise, clipped_fraction, measure, model_mse, mse, noise_of, sqnr_db
from qat_runner.quant.quantizer import EVAL_MODES, NotCalibratedError, Quantizer

__all__ = [
    "BITS",
    "CLIPPING_METHODS",
    "EVAL_MODES",
    "GRADIENTS",
    "LEARNED",
    "DoReFaQuantizer",
    "Grid",
    "LearnedQuantizer",
    "Noise",
    "NotCalibratedError",
    "Quantizer",
    "clipped_fraction",
    "fake_quantize",
    "maximum",
    "measure",
    "model_mse",
    "mse",
    "mse_sweep",
    "newton_step",
    "noise_of",
    "octav",
    "percentile",
    "sqnr_db",
]
