"""From a trained network to integers: static scalars, weights as codes, files that others can run."""

from qat_runner.exporting.folding import fold_batchnorm
from qat_runner.exporting.integer import IntegerConv2d, IntegerLinear, IntegerMatmul, to_integers

__all__ = ["IntegerConv2d", "IntegerLinear", "IntegerMatmul", "fold_batchnorm", "to_integers"]
