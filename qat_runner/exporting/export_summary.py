"""The results of an export, formatted for the terminal and for HTML reports."""

from tabulate import tabulate

from qat_runner.config.tasks import Measure, measure
from qat_runner.exporting.agreement import Figures, agrees, figures_of
from qat_runner.runs.records import Export

FUSED = "onnx_fused"
"""Key of the figures of the ONNX file as onnxruntime runs it by default, with this processor's kernels."""


def text(result: Export) -> str:
    """Return the result of an export for the terminal."""
    names = {
        "dynamic": "dynamic scalars",
        "static": "static scalars",
        "onnx": "model.onnx",
        FUSED: "model.onnx, this processor's kernels",
        "torch": "model.pt2",
    }
    rows = [
        (
            label,
            f"{found.accuracy:.2f}",
            "" if found.agreement is None else f"{found.agreement:.2f}",
            "" if found.largest_difference is None else f"{found.largest_difference:.3g}",
        )
        for key, label in names.items()
        if key in result["figures"]
        for found in [figures_of(result["figures"][key])]
    ]
    quality = tabulate(
        rows,
        ("network", measure(result["metric"]).head, "same predictions %", "largest logit difference"),
        disable_numparse=True,
        colalign=("left", "right", "right", "right"),
    )
    whole, times = result["bytes"]["full_precision"], result.get("milliseconds", {})
    costs = tabulate(
        [
            (
                names.get(key, key.replace("_", " ")) if key != "safetensors" else "model.safetensors",
                f"{size / 1e6:.2f}",
                f"{size / whole:.2f}",
                f"{times[key]:.2f}" if key in times else "",
            )
            for key, size in result["bytes"].items()
        ],
        ("file", "MB", "of full precision", "ms per sample"),
        disable_numparse=True,
        colalign=("left", "right", "right", "right"),
    )
    batches = f" over {result['batches']} batches" if result["batches"] else ""
    kept = f", except {', '.join(result['batchnorm_kept'])}" if result["batchnorm_kept"] else ""
    head = (
        f"{result['model']}, {_bits(result)}, {result['clipping']}; "
        f"scalars {result['scalars']}{batches}; BatchNorm {result['batchnorm']}{kept}"
    )
    return "\n\n".join([head, quality, *_warning(result), costs])


def _bits(result: Export) -> str:
    """Return the bit-widths as requested; if they were chosen for each tensor, their averages."""
    if "weight_bits" in result and "activation_bits" in result:
        return f"{result['weight_bits']}/{result['activation_bits']} bits (weights/activations)"
    means = result.get("mean_weight_bits"), result.get("mean_activation_bits")
    averages = "/".join("-" if mean is None else f"{mean:.2f}" for mean in means)
    return f"{averages} bits (average of weights/activations, over all quantized tensors)"


def _warning(result: Export) -> list[str]:
    """Return a warning if this processor's kernels do not compute what the ONNX file defines, and a remedy."""
    figures = result["figures"]
    if FUSED not in figures or agrees(
        figures_of(figures[FUSED]), figures_of(figures["static"]), measure(result["metric"])
    ):
        return []
    return [
        "model.onnx is correct, but onnxruntime's fused kernels compute other predictions from it on this processor\n"
        f"({result['processor']}). They round in other places, and on a processor without VNNI\n"
        "instructions, their sums of products of uint8 and int8 saturate at 16 bits. Weights of 7 bits prevent that:\n"
        "weight_bits=7 (and first_last_bits=7 for the first and last layer). With the session option\n"
        "session.disable_quant_qdq=1, onnxruntime computes what the file defines, more slowly."
    ]


def text_of_rules(figures: dict[str, Figures], measure: Measure) -> str:
    """Return the figures from `compare_rules` for the terminal; `measure` describes and names the accuracy."""
    first = next(iter(figures.values()))
    rows = [
        (
            name,
            f"{found.accuracy:.2f}",
            "" if found is first else _difference(found, first),
            "" if found.agreement is None else f"{found.agreement:.2f}",
        )
        for name, found in figures.items()
    ]
    return tabulate(
        rows,
        (
            "scalars",
            measure.head,
            "difference ± standard error",
            "same predictions %",
        ),
        disable_numparse=True,
        colalign=("left", "right", "right", "right"),
    )


def _difference(found: Figures, reference: Figures) -> str:
    """Return the difference of two accuracies, in their unit, with its standard error if that is known."""
    error = "" if found.standard_error is None else f" ± {found.standard_error:.2f}"
    return f"{found.accuracy - reference.accuracy:+.2f}{error}"
