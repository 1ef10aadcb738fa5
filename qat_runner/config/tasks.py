"""The facts about each task that a config needs, kept here so that configs do not import the code of tasks.

A data set's YAML file sets its task (`dataset.task`). The code of each task is in `qat_runner.tasks`, under the same
name as here.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qat_runner.plugins import Registry


@dataclass(frozen=True)
class Measure:
    """A metric of a validation pass, and how to interpret it."""

    name: str
    unit: str = "%"
    """unit; empty for a plain number"""
    lower_is_better: bool = False

    @property
    def worst(self) -> float:
        """The value that every other one is better than."""
        return math.inf if self.lower_is_better else -math.inf

    @property
    def head(self) -> str:
        """The head of a table column: name and unit."""
        return f"{self.name} {self.unit}".rstrip()

    @property
    def title(self) -> str:
        """The title of a chart: the metric with its unit or, if it has none, which direction is better."""
        if self.unit:
            return f"Accuracy ({self.unit})"
        return f"{self.name.capitalize()} ({'lower' if self.lower_is_better else 'higher'} is better)"

    @property
    def points(self) -> str:
        """The unit of differences: percentage points for a percentage."""
        return "points" if self.unit == "%" else self.unit or self.name

    def better(self, value: float, than: float) -> bool:
        """Whether one value is better than another."""
        return value < than if self.lower_is_better else value > than

    def best(self, values: Iterable[float]) -> float:
        """Return the best of one or more values."""
        return min(values) if self.lower_is_better else max(values)

    def describe(self, value: float) -> str:
        """Format a value with its unit."""
        return f"{value:.2f} {self.unit}".rstrip()


@dataclass(frozen=True)
class TaskFacts:
    """The properties of a run that follow from its task."""

    metric: str
    """name of the main metric of a validation pass"""
    modes: tuple[str, ...]
    """modes that train; mode=auto selects the first one, unless the recipe lacks it"""
    own_keys: frozenset[str]
    """keys that only some tasks use and that this one does; keys of other tasks are not part of its runs"""
    calibration_batches: int
    """default number of training batches for the calibration of static scalars"""
    calibration_batch_size: int
    """default number of samples in each of these batches"""
    first_last_bits: int | None = None
    """default bit-width of the first and the last layer; None: no exception for these layers"""
    quantize_head: bool = True
    """default of `quantize_head`"""
    linear_granularity: str = "tensor"
    """value that linear_granularity=auto selects"""
    not_drawn: tuple[str, ...] = ()
    """metrics without a curve in charts, since it would flatten the other curves"""
    dashed: tuple[str, ...] = ()
    """metrics whose curve is dashed"""
    unit: str = "%"
    """unit of the main metric; empty for a plain number"""
    lower_is_better: bool = False
    """whether lower values of the main metric are better"""

    @property
    def measure(self) -> Measure:
        """The main metric, and how to interpret it."""
        return Measure(self.metric, self.unit, self.lower_is_better)


IMAGE_KEYS = frozenset(
    (
        *(
            "model.stem",
            "model.width",
            "model.stride_in",
            "model.bn_eps",
            "channels_last",
            "cudnn_benchmark",
            "conv_granularity",
        ),
        *("dataset.num_classes", "dataset.image_size", "dataset.mean", "dataset.std", "dataset.augment"),
        *(
            "dataset.fake_pictures",
            "dataset.skip_corrupt",
            "dataset.resizing",
            "dataset.decode",
            "dataset.interpolation",
            "dataset.resize_size",
            "dataset.preprocessing",
        ),
    )
)

FACTS: Registry[TaskFacts] = Registry(
    "task",
    "qat_runner.tasks",
    {
        "classification": TaskFacts(
            metric="top1",
            modes=("scratch", "retrain", "long_retrain"),
            own_keys=IMAGE_KEYS,
            calibration_batches=5,
            calibration_batch_size=64,
            first_last_bits=8,
            not_drawn=("top5",),
        ),
        "question_answering": TaskFacts(
            metric="f1",
            modes=("finetune", "scratch", "retrain", "long_retrain"),
            own_keys=frozenset(
                (
                    *(
                        "model.checkpoint",
                        "dataset.max_length",
                        "dataset.stride",
                        "dataset.padding",
                        "dataset.one_window",
                    ),
                    *(
                        "dataset.train_questions",
                        "dataset.val_questions",
                        "dataset.n_best",
                        "dataset.max_answer_length",
                    ),
                )
            ),
            calibration_batches=10,
            calibration_batch_size=4,
            quantize_head=False,
            linear_granularity="channel",
            dashed=("em",),
        ),
        "language_modelling": TaskFacts(
            metric="perplexity",
            unit="",
            lower_is_better=True,
            modes=("finetune", "scratch", "retrain", "long_retrain"),
            own_keys=frozenset(("model.checkpoint", "dataset.max_length")),
            calibration_batches=10,
            calibration_batch_size=4,
            quantize_head=False,
            linear_granularity="channel",
            not_drawn=("accuracy",),
        ),
    },
    valid=lambda facts: isinstance(facts, TaskFacts),
    of=lambda task: task.facts,
)
"""Task name -> its facts. `qat_runner.tasks.register` adds further tasks."""


def foreign_keys(task: TaskFacts) -> frozenset[str]:
    """Return the dotted keys that have no meaning for a task: those that only other built-in tasks use. This does not
    depend on installed packages."""
    return frozenset().union(*(FACTS[name].own_keys for name in FACTS.own)) - task.own_keys


def metrics() -> Sequence[str]:
    """Return the names of the main metrics of all tasks."""
    return tuple(dict.fromkeys(facts.metric for _, facts in FACTS.sound()))


def measure(name: str) -> Measure:
    """Return how to interpret a metric, by its name; a metric that is not the main one of any task is in percent."""
    return next((facts.measure for _, facts in FACTS.sound() if facts.metric == name), Measure(name))
