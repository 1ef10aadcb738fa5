"""Comparison of files with the network that they were written from: results on the validation set, and latency."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat_runner.data import Batch, Data
from qat_runner.errors import ConfigError
from qat_runner.exporting.agreement import Figures
from qat_runner.runs.records import ExportFigures
from qat_runner.tasks import Task, joined

Compute = Callable[[Sequence[Tensor]], Tensor]
"""Function of the inputs that returns the logits of the task."""


@torch.inference_mode()
def compare(
    reference: Compute, others: Mapping[str, Compute], task: Task[Any], data: Data, batches: Iterable[Batch]
) -> list[Figures]:
    """Run the reference and the others on the same batches, and return the figures of each, in this order."""
    computes = [reference, *others.values()]
    scores = [task.score(data) for _ in computes]
    same = [0] * len(computes)
    largest = [0.0] * len(computes)
    gained, lost = [0] * len(computes), [0] * len(computes)
    samples, paired = 0, True
    for batch in batches:
        all_logits = [compute(batch.inputs) for compute in computes]
        expected = task.predictions(all_logits[0])
        reference_right = task.right(expected, batch.targets)
        for i, logits in enumerate(all_logits):
            scores[i].add(task.loss(logits, batch.targets), logits, batch.targets)
            found = task.predictions(logits)
            same[i] += int((found == expected).reshape(len(expected), -1).all(1).sum())
            largest[i] = max(largest[i], largest_difference(logits, all_logits[0]))
            right = task.right(found, batch.targets)
            if right is None or reference_right is None:
                paired = False
                continue
            gained[i] += int((right & ~reference_right).sum())
            lost[i] += int((reference_right & ~right).sum())
        samples += len(expected)
    first, *accuracies = [score.read()[task.facts.metric] for score in scores]
    return [
        Figures(first),
        *(
            Figures(
                accuracy,
                100 * same[i] / samples,
                largest[i],
                paired_standard_error(gained[i], lost[i], samples) if paired else None,
            )
            for i, accuracy in enumerate(accuracies, 1)
        ),
    ]


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two elements of tensors of the same shape.

    It is infinity if only one of them is infinite, or one is NaN.
    """
    apart = torch.where(a == b, 0.0, (a - b).abs())  # equal infinities do not differ
    return apart.nan_to_num(nan=math.inf, posinf=math.inf).max().item()


def paired_standard_error(gained: int, lost: int, samples: int) -> float:
    """Return the standard error of the difference of two accuracies on the same samples, in percentage points.

    Args:
        gained: number of samples that only the first network gets right.
        lost: number of samples that only the second one gets right.
        samples: number of all samples.
    """
    variance = (gained + lost) / samples - ((gained - lost) / samples) ** 2  # a sample's difference is 1, 0 or -1
    return 100 * math.sqrt(variance / samples)


class OnnxFile:
    """An ONNX file that runs in onnxruntime, on the CPU, with as many threads as PyTorch.

    Args:
        path: the file.
        fused: True: as onnxruntime does by default, with integer kernels in place of dequantize, compute, quantize.
            Their results depend on the processor, because some add products of uint8 and int8 in 16 bits, which
            saturate. False: compute what the file defines, node by node.

    Raises:
        ConfigError: onnxruntime is not installed.
    """

    def __init__(self, path: Path, *, fused: bool) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ConfigError("ONNX needs onnxruntime: pip install 'qat_runner[export]'") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        if not fused:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._names = [value.name for value in self._session.get_inputs()]

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        outputs = self._session.run(None, self._feed(inputs))
        return joined([torch.from_numpy(value) for value in outputs])

    def seconds(self, inputs: Sequence[Tensor]) -> float:
        """Return the seconds of one call, without the conversion of tensors."""
        feed = self._feed(inputs)
        began = time.perf_counter()
        self._session.run(None, feed)
        return time.perf_counter() - began

    def _feed(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        return {name: t.contiguous().numpy() for name, t in zip(self._names, inputs, strict=True)}


def latency(files: Mapping[str, OnnxFile], inputs: Sequence[Tensor]) -> dict[str, float]:
    """Return the median milliseconds of a call; the files take turns, so that a noisy moment affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in files}
    for turn in range(55):
        for name, file in files.items():
            seconds = file.seconds(inputs)
            if turn >= 5:  # the first calls are slower
                times[name].append(1000 * seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def recorded(figures: Figures) -> ExportFigures:
    """Return figures as they are in export.json, without those that are not known."""
    known: ExportFigures = {"accuracy": figures.accuracy}
    if figures.agreement is not None:
        known["agreement"] = figures.agreement
    if figures.largest_difference is not None:
        known["largest_difference"] = figures.largest_difference
    if figures.standard_error is not None:
        known["standard_error"] = figures.standard_error
    return known
