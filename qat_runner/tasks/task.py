"""The interface of a task: everything the runner needs that is specific to one kind of problem."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat_runner.allocation import Objective, distribution_objective, divergence, loss_objective
from qat_runner.config import Config
from qat_runner.config.tasks import TaskFacts
from qat_runner.data import Batch, Data
from qat_runner.data.mixing import MIXING
from qat_runner.errors import ConfigError
from qat_runner.tasks.totals import Totals

D = TypeVar("D", bound=Data)


class Task(ABC, Generic[D]):
    """One kind of problem, such as classification: its networks, loss, metrics and terms.

    D is the type of its data sets. The output of a network is called logits, whatever it is: one tensor [N, ...].
    """

    name: ClassVar[str]
    """name of the task, the value of `dataset.task`"""
    facts: ClassVar[TaskFacts]
    """what the config must know about the task"""
    networks: ClassVar[Collection[str]]
    """names of the models that support the task"""
    unit: ClassVar[str]
    """unit of the samples, one short word"""
    inputs: ClassVar[tuple[str, ...]]
    """names, in exported files, of the arguments of a network's forward method"""
    mixes: ClassVar[bool] = False
    """whether a stage of the recipe may set the keys of `MIXING` and drop_path"""
    outputs: ClassVar[tuple[str, ...]]
    """names of the outputs in exported files; if there are several, also their field names in the result of forward"""

    def check(self, config: Config) -> None:
        """Check, from the config alone, whether the run is possible.

        Raises:
            ConfigError: the network is for another task, or something that the task requires is missing.
        """
        if config.model.name not in self.networks:
            raise ConfigError(
                f"model={config.model.name}: does not support dataset={config.dataset.name}; must be one of "
                f"{', '.join(self.networks)}"
            )
        for key in (*MIXING, "drop_path") if config.training and not self.mixes else ():
            if value := getattr(config.stage, key):
                raise ConfigError(f"recipe.{config.mode}.{key}={value:g}: is only for images, not for {self.name}")

    def tokenizer(self, config: Config) -> Any:
        """Return the tokenizer for text data sets, or None if there is none."""
        return None

    @abstractmethod
    def network(self, config: Config, data: D | None, pretrained: bool = False) -> nn.Module:
        """Build the network without quantizers, on torch's default device.

        Args:
            config: the resolved config.
            data: the data that the network is for; None: the data have not been read, and the config alone is used.
            pretrained: load the weights of the network's checkpoint, for tasks with checkpoints.
        """

    def mixing(self, config: Config, data: D) -> Callable[[Batch, int, int], Batch] | None:
        """Return a function (batch, epoch, step) -> batch that is applied to training batches, or None.

        Only used if `mixes` is true.
        """
        return None

    def knows_head(self, config: Config) -> bool:
        """Return whether the config alone determines the last layer of a network."""
        return True

    def compute(self, model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
        """Return the model's logits for the inputs of a batch."""
        return joined(separate(model(*inputs), self.outputs))

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean loss of a batch, float32 [], from logits [N, ...] and targets [N, ...].

        The computation must be in float32 also without autocast.
        """

    @abstractmethod
    def distance(self, logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Return the mean distance, float32 [], of logits from a teacher's, both [N, ...], for distillation."""

    def objective(self) -> Objective:
        """Return the objective of bit allocation: how logits are computed, and how quantization error is measured."""
        return loss_objective(
            lambda model, batch: self.compute(model, batch.inputs),
            lambda logits, batch: (self.loss(logits, batch.targets), batch.targets.numel()),
        )

    @abstractmethod
    def predictions(self, logits: Tensor) -> Tensor:
        """Return the predictions, discrete values [M, ...]: two networks agree where they are equal.

        M is the number of units that are counted: samples, or parts of samples that are right or wrong independently.
        """

    def right(self, predictions: Tensor, targets: Tensor) -> Tensor | None:
        """Return whether each sample is right, bool [N]; None if the metric is not the fraction of right samples."""
        return None

    @abstractmethod
    def totals(self, device: torch.device) -> Totals:
        """Return the sums for a pass over training batches."""

    @abstractmethod
    def score(self, data: D) -> Totals:
        """Return the sums for a pass over all of `val_batches`; reading them gives the metric."""

    def longest(self, config: Config) -> int | None:
        """Return the largest size of the second dimension of all inputs, which may vary; None: the size is fixed."""
        return None

    def about(self, config: Config, data: D) -> dict[str, Any]:
        """Return what users of an exported file must know about its inputs, as JSON values."""
        return {}


class Choice(Task[D]):
    """A task of choosing classes: logits [N, C], or [N, C, d] for d choices; targets int64 [N] or [N, d]."""

    def loss(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the cross entropy; targets can also be class probabilities, float [N, C]."""
        return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)

    def distance(self, logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return divergence(logits, teacher, temperature, dim=1)

    def objective(self) -> Objective:
        return distribution_objective(lambda model, batch: self.compute(model, batch.inputs), dim=1)

    def predictions(self, logits: Tensor) -> Tensor:
        """Return the classes with the highest logits, int64 [N] or [N, d]."""
        return logits.argmax(1)


def separate(out: Any, names: Sequence[str]) -> tuple[Tensor, ...]:
    """Return the result of a network as a tuple of tensors, in the order of the outputs of exported files.

    Args:
        out: a tensor, a sequence of tensors, or a result with named fields.
        names: names of the fields to take, in order; only used for results with named fields.
    """
    if isinstance(out, Tensor):
        return (out,)
    named = fields_of(out)
    return tuple(out if named is None else (named[name] for name in names))


def fields_of(out: Any) -> Mapping[str, Any] | None:
    """Return the named fields of a result, or None for a tensor, tuple or list, which have no named fields."""
    if isinstance(out, Mapping):
        return out
    if hasattr(out, "_asdict"):
        return dict(out._asdict())
    return None if isinstance(out, Tensor | tuple | list) else vars(out)


def joined(outputs: Sequence[Tensor]) -> Tensor:
    """Join outputs to logits: a single output as it is; d outputs of shape [N, C] as [N, C, d]."""
    return outputs[0] if len(outputs) == 1 else torch.stack(list(outputs), dim=2)
