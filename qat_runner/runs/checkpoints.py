"""What a checkpoint holds, described so that whatever comes from a file can be held against it."""

from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, with_config
from torch import Tensor
from typing_extensions import TypedDict

from qat_runner.runs.records import Count, Real


@with_config(ConfigDict(arbitrary_types_allowed=True))
class RandomState(TypedDict):
    """Of all global generators: see `checkpoint.random_state`."""

    torch: Tensor
    cuda: list[Tensor]
    numpy: Annotated[list[Any], Field(min_length=5, max_length=5)]
    python: Annotated[list[Any], Field(min_length=3, max_length=3)]


@with_config(ConfigDict(arbitrary_types_allowed=True))
class ProcessState(TypedDict):
    """What of a run is one process's own."""

    random: RandomState
    totals: Tensor
    buffers: dict[str, Tensor]
    averaged: NotRequired[dict[str, Tensor]]
    """buffers of its average"""
    corrupt: NotRequired[list[str]]
    """what it could not read and left out"""


@with_config(ConfigDict(extra="forbid"))
class Progress(TypedDict):
    """How far a run has come: `loop.State`."""

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
    """All that a run needs to go on."""

    model: dict[str, Tensor]
    """what was validated: the moving average, where there is one"""
    trained: NotRequired[dict[str, Tensor]]
    """what it is the average of"""
    averaged_steps: NotRequired[Count]
    """that it is made of"""
    oscillations: NotRequired[dict[str, Tensor]]
    """where codes of weights are watched: `Oscillations.state`"""
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    processes: Annotated[list[ProcessState], Field(min_length=1)]
    state: Progress
    config: dict[str, Any]
    """its identity; of checkpoints of before its whole config, nested"""
