"""What a config must know of each task: a few plain facts, so that no config needs the code that carries a task out.

A data set's YAML file names its task (`dataset.task`). The code of a task is in `qat_runner.tasks`, which has a name
here, too.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qat_runner.plugins import Registry


@dataclass(frozen=True)
class Measure:
    """A figure of a validation pass, and how it is read."""

    name: str
    unit: str = "%"
    """empty: it is a plain number"""
    lower_is_better: bool = False

    @property
    def worst(self) -> float:
        """What every value is better than."""
        return math.inf if self.lower_is_better else -math.inf

    @property
    def head(self) -> str:
        """Of a column: name and unit."""
        return f"{self.name} {self.unit}".rstrip()

    @property
    def title(self) -> str:
        """Of a chart: what the figure is, with its unit or else its direction."""
        if self.unit:
            return f"Accuracy ({self.unit})"
        return f"{self.name.capitalize()} ({'lower' if self.lower_is_better else 'higher'} is better)"

    @property
    def points(self) -> str:
        """What differences are counted in."""
        return "points" if self.unit else self.name

    def better(self, value: float, than: float) -> bool:
        """Whether one value is better than another."""
        return value < than if self.lower_is_better else value > than

    def best(self, values: Iterable[float]) -> float:
        """Of at least one."""
        return min(values) if self.lower_is_better else max(values)

    def told(self, value: float) -> str:
        """A value with its unit."""
        return f"{value:.2f} {self.unit}".rstrip()


@dataclass(frozen=True)
class TaskFacts:
    """What of a run follows from its task."""

    metric: str
    """name of the figure of a validation pass that counts"""
    modes: tuple[str, ...]
    """those that it trains in; the first is what mode=auto stands for"""
    own_keys: frozenset[str]
    """keys that mean something to it, of those that do not to every task; the other tasks' are no part of its runs"""
    calibration_batches: int
    """training batches that static scalars are calibrated on by default"""
    calibration_batch_size: int
    """samples of each by default"""
    first_last_bits: int | None = None
    """of both ends of its networks by default; None: they have no such ends"""
    quantize_head: bool = True
    """by default"""
    linear_granularity: str = "tensor"
    """what linear_granularity=auto stands for"""
    not_drawn: tuple[str, ...] = ()
    """figures of a pass that have no curve, since it would flatten the others"""
    dashed: tuple[str, ...] = ()
    """figures whose curve is drawn so"""
    unit: str = "%"
    """of the metric; empty: it is a plain number"""
    lower_is_better: bool = False
    """whether less of the metric is better"""

    @property
    def measure(self) -> Measure:
        """The metric, and how it is read."""
        return Measure(self.metric, self.unit, self.lower_is_better)


PICTURE_KEYS = frozenset(
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
            own_keys=PICTURE_KEYS,
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
"""By name. Tasks of others can be added: `qat_runner.tasks.register`."""


def foreign_keys(task: TaskFacts) -> frozenset[str]:
    """Dotted keys that mean nothing to a task: those that others of ours have for themselves, whatever is installed."""
    return frozenset().union(*(FACTS[name].own_keys for name in FACTS.own)) - task.own_keys


def metrics() -> Sequence[str]:
    """Names of the figures that count, of all tasks."""
    return tuple(dict.fromkeys(facts.metric for _, facts in FACTS.sound()))


def measure(name: str) -> Measure:
    """How a figure is read, by its name; one that counts for no task is in percent."""
    return next((facts.measure for _, facts in FACTS.sound() if facts.metric == name), Measure(name))
