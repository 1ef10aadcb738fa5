"""Where quantizers go: the policy (what every tensor gets), the layers, insertion, calibration, saving."""

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
