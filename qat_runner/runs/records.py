"""What each file of a run folder holds: the one description from which it is written, and against which it is read.

A key that came later than its file is NotRequired, so that records of before keep loading. config.yaml is described by
the schema (`qat_runner.config`). For pictures, logs and tables that no one reads back there is nothing here.
"""

from collections.abc import Mapping
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
"""Levels of a grid that are recorded, at most: more could not be told apart."""


def _no_nan(cell: object) -> object:
    return None if isinstance(cell, str) and cell.strip().lower() in ("", "nan") else cell


Cell = Annotated[float | None, BeforeValidator(_no_nan)]
"""A number in a CSV file; None where there is none."""


# summary.json


@with_config(ConfigDict(extra="allow"))
class Summary(TypedDict):
    """The result of a run; with it, under the name of its metric, and of what else validation tells, the figures.

    Those of the tasks that there were from the start are listed; other tasks bring others.
    """

    model: str
    dataset: str
    mode: str
    clipping: str
    gradient: str
    seed: int
    epochs: Count
    """done"""
    seconds: Real
    sqnr_db: Real | None
    bits: NotRequired[int | str]
    """of weights and activations, as "4/8" where they differ"""
    weight_bits: NotRequired[Bits]
    activation_bits: NotRequired[Bits]
    mean_weight_bits: NotRequired[Real | None]
    """over the elements of the weights that are quantized"""
    mean_activation_bits: NotRequired[Real | None]
    """the same of activations"""
    distilled: NotRequired[bool]
    remedies: NotRequired[list[str]]
    """what else was done: `Config.told_remedies`"""
    processes: NotRequired[Count]
    metric: NotRequired[str]
    """name of the figure that counts"""
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
    """of the elements of weights whose codes were watched, those that oscillated in the end"""
    frozen_weights: NotRequired[Percent]
    """of the same, those that were frozen"""
    batchnorm_batches: NotRequired[Count]
    """on which BatchNorm was estimated anew after training"""
    before_reestimation: NotRequired[Real | None]
    """what the figure that counts was before"""
    quantized_macs: NotRequired[Percent | None]
    """of the network's multiply-accumulates, those of quantized tensors"""
    quantization_mse: NotRequired[Real | None]
    corrupt_pictures: NotRequired[Count]
    run_dir: NotRequired[str]
    answer: NotRequired[str]
    """of a run in mode allocate: what it came to, in a sentence"""


def metric(summary: Mapping[str, Any]) -> str:
    """Name of the figure of a run that counts; records of old do not tell."""
    return str(summary.get("metric") or next((name for name in metrics() if name in summary), metrics()[0]))


def score(summary: Mapping[str, Any]) -> float:
    """The figure of a run that counts; `measured` tells how it is read."""
    return float(summary[metric(summary)])


def measured(summary: Mapping[str, Any]) -> Measure:
    """What the figure of a run that counts is."""
    return measure(metric(summary))


def _with_its_figure(summary: Summary) -> Summary:
    name = metric(summary)
    if name not in metrics():
        raise ValueError(f"metric: must be {' or '.join(metrics())}, not {name}")
    if name not in summary:
        raise ValueError(f"{name}: field required")
    values: Any = Percent if measure(name).unit else Real
    for key, kind in ((name, values), (f"best_{name}", values | None)):
        try:
            fit(kind, summary.get(key))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    if ("size_mb" in summary) != ("fp32_size_mb" in summary):
        raise ValueError("size_mb, fp32_size_mb: one is of no use without the other")
    return summary


def _filled(row: object) -> object:
    """A line of a table of results, without its empty cells; lists have "+" between their words."""
    if not isinstance(row, dict):
        return row
    cells = {key: cell for key, cell in row.items() if cell}
    return {"sqnr_db": None, **cells} | ({"remedies": cells["remedies"].split("+")} if "remedies" in cells else {})


ResultRow = Annotated[Summary, BeforeValidator(_filled), AfterValidator(_with_its_figure)]
"""Of a CSV file that has the content of a summary.json in each line."""


# environment.json


class Git(TypedDict):
    """The checkout that the code ran from."""

    commit: str
    branch: str
    dirty: bool


class Machine(TypedDict):
    """What the run ran on."""

    platform: str
    processor: str
    cores: Count | None
    torch_threads: Count
    gpus: list[str]
    cuda: str | None


class Sitting(TypedDict):
    """What a run was begun, or went on, in."""

    command: list[str]
    directory: NotRequired[str]
    job: NotRequired[str | None]
    """of a cluster, or one of a sweep's; it keeps its name when it is put back into the queue"""
    started: str
    python: str
    packages: dict[str, str | None]
    git: Git | None
    machine: Machine
    processes: NotRequired[Count]


class Environment(Sitting):
    """The first sitting of a run, and the later ones."""

    resumed: NotRequired[list[Sitting]]


# The CSV files


class StepRow(TypedDict):
    """A training step."""

    epoch: Count
    step: Count
    """of the epoch, from 1 on"""
    loss: Cell
    lr: Cell
    excess_mse_mean: NotRequired[Cell]
    excess_mse_max: NotRequired[Cell]
    """what a warm start cost, over the quantizers of a process: mean and highest, each in the mean over processes"""


class LayerRow(TypedDict):
    """A `LayerNoise`, and its epoch; 0 is before any training."""

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
    """How the codes of a weight behaved in the steps up to the end of an epoch."""

    epoch: Count
    layer: str
    elements: Count
    oscillating: Percent
    """of the elements, those that flip more often than oscillations.threshold"""
    frozen: Percent
    """of the elements"""


EpochRow = dict[str, float | None]
"""An epoch: what training and validation tell, under names that begin with train_ and val_, and lr, seconds, ..."""


def _of_an_epoch(row: EpochRow) -> EpochRow:
    epoch = row.get("epoch")
    if epoch is None or not 0 <= epoch <= 2**53 or epoch != int(epoch):
        raise ValueError("epoch: must be a whole number")
    if validated(row) is None:
        raise ValueError(f"val_{metrics()[0]}: field required")
    return row


def validated(row: Mapping[str, Any]) -> str | None:
    """The key, of a row an epoch, of the figure that counts; None where it has none."""
    return next((key for name in metrics() if (key := f"val_{name}") in row), None)


# histograms.json


class Histogram(TypedDict):
    """How the values of a tensor lie on its grid: of x / s, each channel divided by its own s, one grid for all."""

    layer: str
    tensor: str
    bits: Bits
    signed: bool
    granularity: str
    s: Real
    """clipping scalar of the latest batch in units of x, the mean over the channels where there are several"""
    low: Real
    """left end of the first bin, in units of s, like all that follow"""
    high: Real
    """right end of the last bin"""
    lowest: Real
    """the smallest value of the first batch"""
    highest: Real
    """the largest value of the first batch"""
    beyond: Count
    """values outside of the bins"""
    counts: Annotated[list[Count], Field(min_length=1)]
    """values in each bin; all bins have the same width"""
    levels: NotRequired[list[Real]]
    """those of the grid; none where there are more than LEVELS"""
    ends: NotRequired[Annotated[list[Real], Field(min_length=2, max_length=2)]]
    """of a format that has two, where one pair holds for the whole tensor: the lower and the upper one"""


# export/export.json


class ExportFigures(TypedDict):
    """What a network, or a file, does on the validation set: `verify.Figures`."""

    accuracy: Real | None
    """the task's metric; null where it is not finite"""
    agreement: NotRequired[Real]
    largest_difference: NotRequired[Real | None]
    standard_error: NotRequired[Real | None]


class Export(TypedDict):
    """What qat-export wrote, and what came out when it was run."""

    run: str
    model: str
    dataset: str
    weight_bits: NotRequired[Bits]
    """as asked for; none where bits were chosen"""
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
        raise ValueError("figures.onnx_fused: needs agreement, and processor beside it")
    return export


# allocation.json


Width = Annotated[str, Field(pattern="^[0-9]{1,2}$")]
"""Bits, where they are a key."""
PriceKind = Annotated[str, Field(pattern="^(gradient|measured|noise)$")]


class Point(TypedDict):
    """Bits of all tensors, by what they cost and what they are foretold to."""

    costs: dict[str, Real]
    """by name of the figure, such as "mean bits of weights" or "MB" """
    rise: Real
    """sum of the prices"""
    value: Real | None
    """the metric, where it was measured"""
    width: NotRequired[Bits]
    """of all tensors alike"""


class PricedTensor(TypedDict):
    """A tensor, its bits, and what others would have cost."""

    layer: str
    tensor: str
    elements: Count
    """of an activation for one sample"""
    bits: Bits
    noise: dict[Width, Real]
    """bits -> noise-to-signal ratio; none, as below, where a rule says the bits"""
    price: dict[Width, Real]
    """bits -> price"""
    beside: dict[Width, Real]
    """bits -> price of another kind, where there is one"""


class AllocationRecord(TypedDict):
    """What a run of mode allocate came to."""

    answer: str
    """a sentence"""
    cost: str
    """the key that the front goes by"""
    figures: Annotated[list[str], Field(min_length=1)]
    """the costs of a point that it stands for, of which the largest counts"""
    price: PriceKind
    """the kind that bits were chosen by"""
    beside: PriceKind
    """another kind, to hold against it"""
    metric: str
    reference: Real
    """the metric of full precision"""
    chosen: Point
    uniform: list[Point]
    measured: NotRequired[list[Point]]
    """of those on the way, all but uniform ones"""
    front: list[Point]
    tensors: list[PricedTensor]
    stability: Real | None
    """bits by which a tensor differs, in the mean, on other batches; null where there was one alone"""
    seconds: Real
    """of pricing"""
    retrain_steps: Count


def paid(record: AllocationRecord, point: Point) -> float:
    """What a point costs, of what the front of a record goes by."""
    return max(point["costs"][name] for name in record["figures"])


def _with_its_costs(record: AllocationRecord) -> AllocationRecord:
    for point in (record["chosen"], *record["uniform"], *record.get("measured", ()), *record["front"]):
        if missing := [name for name in record["figures"] if name not in point["costs"]]:
            raise ValueError(f"costs: {missing[0]} is missing")
    if record["chosen"]["value"] is None:
        raise ValueError("chosen.value: must be a number")
    return record


# lock


class Owner(TypedDict):
    """The process that is at work in a folder."""

    process: Count
    host: str


# Which file holds which


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
"""A table of the quantized tensors, an empty line, and what else there is to say of them and of all that is not."""
ASKED = TextFile("asked.txt")
"""In a folder of runs: names of all run folders that sweeps asked for, a line each."""
