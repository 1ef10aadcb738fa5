"""qat_runner: how few bits does a network need, and which quantizer achieves that?

In your own training loop:

    import qat_runner as qat

    qat.quantize(model, bits=4, example=x)
    ...
    qat.freeze(model, "averaged", batches)
    qat.save(model, "network.pt")
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat_runner.allocation import allocate
    from qat_runner.exporting.model_export import export
    from qat_runner.insertion import (
        Policy,
        Rule,
        calibrate,
        freeze,
        load,
        noise_report,
        quantize_model,
        remove_quantizers,
        save,
        summary,
    )
    from qat_runner.insertion import quantize_model as quantize
    from qat_runner.insertion import quantized_tensors as tensors
    from qat_runner.quant import fake_quantize, octav

__all__ = [
    "Policy",
    "Rule",
    "allocate",
    "calibrate",
    "export",
    "fake_quantize",
    "freeze",
    "load",
    "noise_report",
    "octav",
    "quantize",
    "quantize_model",
    "remove_quantizers",
    "save",
    "summary",
    "tensors",
]

_ELSEWHERE = {
    "allocate": "allocation.allocate",
    "export": "exporting.model_export.export",
    "fake_quantize": "quant.fake_quantize",
    "octav": "quant.octav",
    "quantize": "insertion.quantize_model",
    "tensors": "insertion.quantized_tensors",
}
"""Public names that are not in `insertion` under the same name, and where they are."""


def __getattr__(name: str) -> Any:
    """Import the library on first use, so that the commands can answer --help without loading PyTorch."""
    if name == "__version__":
        return version("qat_runner")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _ELSEWHERE.get(name, f"insertion.{name}").rpartition(".")
    thing = getattr(import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = thing
    return thing
