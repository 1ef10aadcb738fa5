"""The content of each file in a run folder: one description, used for writing and for validation when reading.

A key that was added to a file later is NotRequired, so that older records still load. config.yaml is described by the
schema (`qat_runner.config`). Images, logs and tables that are never read back are not described here.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from qat_runner.config.tasks import Measure, measure, metrics
from qat_runner.description import fit
from qat_runner.runs.files import CsvFile, JsonFile, TextFile

Count = Annotated[int, Field(ge=0, le=2**53)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Percent = Annotated[float, Field(ge=0, le=100)]
Bits = Annotated[int, Field(ge=1, le=32)]

LEVELS = 64
"""Largest number of levels of a grid that are recorded; more could not be distinguished in a chart."""


def _no_nan(cell: object) -> object:
    return None if isinstance(cell, str) and cell.strip().lower() in ("", "nan") else cell


Cell = Annotated[float | None, BeforeValidator(_no_nan)]
"""A number in a CSV file; None if the cell is empty or NaN."""


# summary.json


@with_config(ConfigDict(extra="allow"))
class Summary(TypedDict):
    """The result of a run, including its metric and the other validation figures under their names.

    The figures of the first tasks are listed here; other tasks add their own.
    """

    model: str
    dataset: str
    mode: str
    clipping: str
    gradient: str
    seed: int
    epochs: Count
    """completed epochs"""
    seconds: Real
    sqnr_db: Real | None
    bits: NotRequired[Annotated[int | str, Field(union_mode="left_to_right")]]
    """bit-width of weights and activations, as "4/8" if they differ"""
    weight_bits: NotRequired[Bits]
    activation_bits: NotRequired[Bits]
    mean_weight_bits: NotRequired[Real | None]
    """average bit-width over the elements of the quantized weights"""
    mean_activation_bits: NotRequired[Real | None]
    """the same for activations"""
    distilled: NotRequired[bool]
    remedies: NotRequired[list[str]]
    """additional techniques: `Config.remedy_labels`"""
    processes: NotRequired[Count]
    metric: NotRequired[str]
    """name of the task's metric"""
    loss: NotRequired[Real | None]
    top1: NotRequired[Percent]
    top5: NotRequired[Percent]
    f1: NotRequired[Percent]
    em: NotRequired[Percent]
    best_top1: NotRequired[Percent | None]
    best_f1: NotRequired[Percent | None]
    steps: NotRequired[Count]
    samples_per_second: NotRequired[Real | None]
    size_mb: NotRequired[Size]
    fp32_size_mb: NotRequired[Size]
    oscillating_weights: NotRequired[Percent]
    """percentage of the elements of tracked weights that oscillated at the end"""
    frozen_weights: NotRequired[Percent]
    """percentage of the same elements that were frozen"""
    batchnorm_batches: NotRequired[Count]
    """number of batches used to re-estimate BatchNorm after training"""
    before_reestimation: NotRequired[Real | None]
    """the metric before BatchNorm was re-estimated"""
    quantized_macs: NotRequired[Percent | None]
    """percentage of the network's multiply-accumulates that are computed on quantized tensors"""
    quantization_mse: NotRequired[Real | None]
    corrupt_pictures: NotRequired[Count]
    run_dir: NotRequired[str]
    answer: NotRequired[str]
    """for mode allocate: the result in one sentence"""
    config: NotRequired[str]
    """in a table of results: the name of the config"""


def metric(summary: Mapping[str, Any]) -> str:
    """Return the name of the metric of a run, also for old records that do not contain it."""
    return str(summary.get("metric") or next((name for name in metrics() if name in summary), metrics()[0]))


def score(summary: Mapping[str, Any]) -> float:
    """Return the metric of a run; `measured` describes how to read it."""
    return float(summary[metric(summary)])


def measured(summary: Mapping[str, Any]) -> Measure:
    """Return the description of the metric of a run."""
    return measure(metric(summary))


def _with_its_figure(summary: Summary) -> Summary:
    name = metric(summary)
    if name not in metrics():
        raise ValueError(f"metric: must be {' or '.join(metrics())}, not {name}")
    if name not in summary:
        raise ValueError(f"{name}: field required")
    values: Any = Percent if measure(name).unit == "%" else Real
    for key, kind in ((name, values), (f"best_{name}", values | None)):
        try:
            fit(kind, summary.get(key))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    if ("size_mb" in summary) != ("fp32_size_mb" in summary):
        raise ValueError("size_mb, fp32_size_mb: must be given together")
    return summary


def _as_number(cell: str) -> float | str:
    """Return the number in a cell; the cell itself if it holds no finite number."""
    with suppress(ValueError):
        if math.isfinite(number := float(cell)):
            return int(cell) if cell.strip("+-").isdecimal() else number
    return cell


def _filled(row: object) -> object:
    """Return a row of a results table as the content of a summary: without its empty cells, with `remedies` split at
    "+" into a list, and with numbers for the figures that `Summary` does not list."""
    if not isinstance(row, dict):
        return row
    listed = Summary.__annotations__
    cells: dict[str, Any] = {key: cell if key in listed else _as_number(cell) for key, cell in row.items() if cell}
    return {"sqnr_db": None, **cells} | ({"remedies": cells["remedies"].split("+")} if "remedies" in cells else {})


ResultRow = Annotated[Summary, BeforeValidator(_filled), AfterValidator(_with_its_figure)]
"""A row of a CSV file that has the content of one summary.json per line."""


# environment.json


class Git(TypedDict):
    """The checkout that the code ran from."""

    commit: str
    branch: str
    dirty: bool


class Machine(TypedDict):
    """The hardware and platform of a run."""

    platform: str
    processor: str
    cores: Count | None
    torch_threads: Count
    gpus: list[str]
    cuda: str | None


class Session(TypedDict):
    """The environment in which a run was started or resumed."""

    command: list[str]
    directory: NotRequired[str]
    job: NotRequired[str | None]
    """job of a cluster or of a sweep; it keeps its name when it is requeued"""
    started: str
    python: str
    packages: dict[str, str | None]
    git: Git | None
    machine: Machine
    processes: NotRequired[Count]


class Environment(Session):
    """The environment in which a run was started, and those in which it was resumed."""

    resumed: NotRequired[list[Session]]


# The CSV files


class StepRow(TypedDict):
    """A training step."""

    epoch: Count
    step: Count
    """number of the step in its epoch, from 1"""
    loss: Cell
    lr: Cell
    excess_mse_mean: NotRequired[Cell]
    excess_mse_max: NotRequired[Cell]
    """excess MSE of warm starts over the quantizers of a process: mean and maximum, each averaged over processes"""


class LayerRow(TypedDict):
    """A `LayerNoise` with its epoch; epoch 0 is before any training."""

    epoch: Count
    layer: str
    tensor: str
    bits: Bits
    signed: bool
    granularity: str
    s: Cell
    mse: Cell
    sqnr_db: Cell
    clipped_fraction: Cell
    max_sqnr_db: Cell


class OscillationRow(TypedDict):
    """How much the codes of a weight oscillate, measured over the steps up to the end of an epoch."""

    epoch: Count
    layer: str
    elements: Count
    oscillating: Percent
    """percentage of elements that flip more often than oscillations.threshold"""
    frozen: Percent
    """percentage of frozen elements"""


EpochRow = dict[str, float | None]
"""An epoch: training and validation figures, named train_* and val_*, and lr, seconds, ..."""


def _of_an_epoch(row: EpochRow) -> EpochRow:
    epoch = row.get("epoch")
    if epoch is None or not 0 <= epoch <= 2**53 or epoch != int(epoch):
        raise ValueError("epoch: must be a whole number")
    if validated(row) is None:
        raise ValueError(f"val_{metrics()[0]}: field required")
    return row


def validated(row: Mapping[str, Any]) -> str | None:
    """Return the key of the metric in the row of an epoch; None if there is none."""
    return next((key for name in metrics() if (key := f"val_{name}") in row), None)


# histograms.json


class Histogram(TypedDict):
    """How the values of a tensor lie on its grid: the values of x / s, where each channel is divided by its own s."""

    layer: str
    tensor: str
    bits: Bits
    signed: bool
    granularity: str
    s: Real
    """clipping scalar of the latest batch in units of x; the mean over the channels if there are several"""
    low: Real
    """lower edge of the first bin, in units of s like the following values"""
    high: Real
    """upper edge of the last bin"""
    lowest: Real
    """the smallest value over all batches"""
    highest: Real
    """the largest value over all batches"""
    beyond: Count
    """number of values outside the bins"""
    counts: Annotated[list[Count], Field(min_length=1)]
    """number of values in each bin; all bins have the same width"""
    levels: NotRequired[list[Real]]
    """quantization levels of the grid; empty if there are more than LEVELS"""
    ends: NotRequired[Annotated[list[Real], Field(min_length=2, max_length=2)]]
    """lower and upper clipping bound of a format with two, if one pair holds for the whole tensor"""


# export/export.json


class ExportFigures(TypedDict):
    """Validation figures of a network or an exported file: `verify.Figures`."""

    accuracy: Real | None
    """the task's metric; null if it is not finite"""
    agreement: NotRequired[Real]
    largest_difference: NotRequired[Real | None]
    standard_error: NotRequired[Real | None]


class Export(TypedDict):
    """The files that qat-export wrote, and the results of running them."""

    run: str
    model: str
    dataset: str
    weight_bits: NotRequired[Bits]
    """as requested; absent if the bits were chosen by bit allocation"""
    activation_bits: NotRequired[Bits]
    mean_weight_bits: NotRequired[Real | None]
    """as in summary.json"""
    mean_activation_bits: NotRequired[Real | None]
    clipping: str
    scalars: str
    batches: Count | None
    batchnorm: str
    batchnorm_kept: list[str]
    metric: str
    processor: NotRequired[str]
    figures: dict[str, ExportFigures]
    bytes: dict[str, Count]
    milliseconds: NotRequired[dict[str, Real]]


def _with_reference(export: Export) -> Export:
    if "static" not in export["figures"]:
        raise ValueError("figures.static: field required")
    if not export["bytes"].get("full_precision"):
        raise ValueError("bytes.full_precision: must be above 0")
    fused = export["figures"].get("onnx_fused")
    if fused is not None and ("agreement" not in fused or "processor" not in export):
        raise ValueError("figures.onnx_fused: needs agreement, and the file needs processor")
    return export


# allocation.json


Width = Annotated[str, Field(pattern="^[0-9]{1,2}$")]
"""A bit-width used as a key."""
PriceKind = Annotated[str, Field(pattern="^(gradient|measured|noise)$")]


class Point(TypedDict):
    """A bit allocation, described by its costs, its price and, if measured, its metric."""

    costs: dict[str, Real]
    """by name of the cost, such as "mean bits of weights" or "MB" """
    rise: Real
    """sum of the prices"""
    value: Real | None
    """the metric, if it was measured"""
    width: NotRequired[Bits]
    """bit-width of all tensors of a uniform allocation"""


class PricedTensor(TypedDict):
    """A tensor, its chosen bit-width, and its noise and prices at all bit-widths."""

    layer: str
    tensor: str
    elements: Count
    """number of elements; for an activation that of one sample"""
    bits: Bits
    noise: dict[Width, Real]
    """bits -> noise-to-signal ratio; empty, like the following two, if a rule sets the bit-width"""
    price: dict[Width, Real]
    """bits -> price"""
    beside: dict[Width, Real]
    """bits -> price of another kind, for comparison, if there is one"""


class AllocationRecord(TypedDict):
    """The result of a run of mode allocate."""

    answer: str
    """the result in one sentence"""
    cost: str
    """the key of the cost that defines the front"""
    figures: Annotated[list[str], Field(min_length=1)]
    """names of the costs of a point that belong to this key; the largest of them counts"""
    price: PriceKind
    """the kind of prices that the allocation is based on"""
    beside: PriceKind
    """another kind of prices, for comparison"""
    metric: str
    reference: Real
    """the metric of the full-precision network"""
    chosen: Point
    uniform: list[Point]
    measured: NotRequired[list[Point]]
    """allocations measured during the search, without uniform ones"""
    front: list[Point]
    tensors: list[PricedTensor]
    stability: Real | None
    """average difference of the bits per tensor on resampled batches; null if there was only one batch"""
    seconds: Real
    """duration of pricing"""
    retrain_steps: Count


def cost_of(record: AllocationRecord, point: Point) -> float:
    """Return the cost of a point by the cost that defines the front of the record."""
    return max(point["costs"][name] for name in record["figures"])


def _with_its_costs(record: AllocationRecord) -> AllocationRecord:
    for point in (record["chosen"], *record["uniform"], *record.get("measured", ()), *record["front"]):
        if missing := [name for name in record["figures"] if name not in point["costs"]]:
            raise ValueError(f"costs: {missing[0]} is missing")
    if any("width" not in point for point in record["uniform"]):
        raise ValueError("uniform: width is missing")
    if record["chosen"]["value"] is None:
        raise ValueError("chosen.value: must be a number")
    return record


# lock


class Owner(TypedDict):
    """The process that is using a folder."""

    process: Count
    host: str


# Files and their contents


SUMMARY: JsonFile[Summary] = JsonFile("summary.json", Annotated[Summary, AfterValidator(_with_its_figure)])
ENVIRONMENT: JsonFile[Environment] = JsonFile("environment.json", Environment)
HISTOGRAMS: JsonFile[list[Histogram]] = JsonFile("histograms.json", list[Histogram])
EXPORT: JsonFile[Export] = JsonFile("export.json", Annotated[Export, AfterValidator(_with_reference)])
ALLOCATION: JsonFile[AllocationRecord] = JsonFile(
    "allocation.json", Annotated[AllocationRecord, AfterValidator(_with_its_costs)]
)
PREDICTIONS: JsonFile[dict[str, str]] = JsonFile("predictions.json", dict[str, str])
"""The answers of the latest validation, by id of the question, in SQuAD's format."""
LOCK: JsonFile[Owner] = JsonFile("lock", Owner)
METRICS: CsvFile[EpochRow] = CsvFile("metrics.csv", Annotated[dict[str, Cell], AfterValidator(_of_an_epoch)])
STEPS: CsvFile[StepRow] = CsvFile("steps.csv", StepRow)
LAYERS: CsvFile[LayerRow] = CsvFile("layers.csv", LayerRow)
OSCILLATIONS: CsvFile[OscillationRow] = CsvFile("oscillations.csv", OscillationRow)
ERROR = TextFile("error.txt")
QUANTIZERS = TextFile("quantizers.txt")
"""A table of the quantized tensors, an empty line, and notes on them and on everything that is not quantized."""
ASKED = TextFile("asked.txt")
"""In a folder of runs: the names of all run folders requested by sweeps, one per line."""
