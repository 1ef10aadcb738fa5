"""The content of a checkpoint, as types against which files are validated."""

from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, with_config
from torch import Tensor
from typing_extensions import TypedDict

from qat_runner.runs.records import Count, Real


@with_config(ConfigDict(arbitrary_types_allowed=True))
class RandomState(TypedDict):
    """State of all global random generators: see `checkpoint.random_state`."""

    torch: Tensor
    cuda: list[Tensor]
    numpy: Annotated[list[Any], Field(min_length=5, max_length=5)]
    python: Annotated[list[Any], Field(min_length=3, max_length=3)]


@with_config(ConfigDict(arbitrary_types_allowed=True))
class ProcessState(TypedDict):
    """The part of a run's state that belongs to one process."""

    random: RandomState
    totals: Tensor
    buffers: dict[str, Tensor]
    averaged: NotRequired[dict[str, Tensor]]
    """buffers of its moving average"""
    corrupt: NotRequired[list[str]]
    """samples that it could not read and skipped"""


@with_config(ConfigDict(extra="forbid"))
class Progress(TypedDict):
    """The progress of a run: `loop.State`."""

    epoch: Count
    step: Count
    steps: Count
    seconds: Real
    train_seconds: Real
    best: float
    val: dict[str, float]
    samples_per_second: float
    before_reestimation: NotRequired[Real | None]


@with_config(ConfigDict(arbitrary_types_allowed=True))
class Checkpoint(TypedDict):
    """Everything that a run needs to resume."""

    model: dict[str, Tensor]
    """the validated model: the moving average, if there is one"""
    trained: NotRequired[dict[str, Tensor]]
    """the trained model, if `model` is its moving average"""
    averaged_steps: NotRequired[Count]
    """number of steps in the moving average"""
    oscillations: NotRequired[dict[str, Tensor]]
    """`Oscillations.state`, if codes of weights are tracked"""
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    processes: Annotated[list[ProcessState], Field(min_length=1)]
    state: Progress
    config: dict[str, Any]
    """identity of the run; in checkpoints of earlier versions, the whole nested config"""
