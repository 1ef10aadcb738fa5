"""qat_runner: how few bits can this network live with, and which quantizer gets it there?

In a training loop of your own:

    from qat_runner import calibrate, freeze, noise_report, quantize_model
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat_runner.insertion import calibrate, freeze, noise_report, quantize_model

__all__ = ["calibrate", "freeze", "noise_report", "quantize_model"]


def __getattr__(name: str) -> Any:
    """Import the library when it is first asked for: the commands answer --help before PyTorch is loaded."""
    if name in __all__:
        from qat_runner import insertion

        return getattr(insertion, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
