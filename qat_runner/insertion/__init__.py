"""Insert quantizers into any PyTorch model: find what it multiplies, convert it in place, calibrate, save and load.

No model code is copied or rewritten. Three mechanisms make that possible:

- **Class swapping** (`layers`). A layer is quantized by giving the module object another class. Its parameters, their
  names, its hooks and all references to it stay valid.
- **Function interception** (`calls`, `own_products`, `own_weights`). Some layers override the forward of their base
  class, and attention modules and mixtures of experts multiply tensors in their own forward. Such a module keeps its
  forward, but a `torch.overrides.TorchFunctionMode` is open while it runs. The mode sees each call of a torch function
  before PyTorch executes it, and runs the calls that multiply with quantized factors.
- **The example input** (`observing`, `trace`, `products`, `unchanged`). One batch runs through the model several times:
  before conversion, to find out what each module's own forward multiplies, and after it, to find the order of the
  layers and the signs of their inputs, to count all products (with a `TorchDispatchMode`, which sees every operator
  that PyTorch dispatches), and to check that the converted model still computes the same outputs.

A policy (`qat_runner.policy`) decides what every tensor gets.
"""

from qat_runner.insertion.calibrate import calibrate, freeze
from qat_runner.insertion.insert import (
    QuantizedTensor,
    full_precision_state_dict,
    quantize_model,
    quantized_tensors,
    remove_quantizers,
)
from qat_runner.insertion.layers import QuantConv2d, QuantLinear
from qat_runner.insertion.noise_report import LayerNoise, NoiseReport, noise_report
from qat_runner.insertion.saving import load, save
from qat_runner.insertion.summary import not_quantized, quantized_share, summary
from qat_runner.insertion.trace import Trace, trace
from qat_runner.policy import FREEZING, Policy, PolicyError, Rule

__all__ = [
    "FREEZING",
    "LayerNoise",
    "NoiseReport",
    "Policy",
    "PolicyError",
    "QuantConv2d",
    "QuantLinear",
    "QuantizedTensor",
    "Rule",
    "Trace",
    "calibrate",
    "freeze",
    "full_precision_state_dict",
    "load",
    "noise_report",
    "not_quantized",
    "quantize_model",
    "quantized_share",
    "quantized_tensors",
    "remove_quantizers",
    "save",
    "summary",
    "trace",
]
