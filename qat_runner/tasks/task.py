"""What a task is: all that the runner must know of one kind of problem, and that no other room knows."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat_runner.allocation import Objective, divergence, of_distributions, of_loss
from qat_runner.config import Config
from qat_runner.config.tasks import TaskFacts
from qat_runner.data import Batch, Data
from qat_runner.data.mixing import MIXING
from qat_runner.errors import ConfigError
from qat_runner.tasks.totals import Totals

D = TypeVar("D", bound=Data)


class Task(ABC, Generic[D]):
    """One kind of problem, such as classification: its networks, loss, metrics and words.

    D is what its data sets are read as. What a network answers is called logits, whatever it is: one tensor [N, ...].
    """

    name: ClassVar[str]
    """as `dataset.task`"""
    facts: ClassVar[TaskFacts]
    """what the config must know of it"""
    networks: ClassVar[Collection[str]]
    """names of the models that can do it"""
    unit: ClassVar[str]
    """what a sample is, in a word"""
    inputs: ClassVar[tuple[str, ...]]
    """names, in exported files, of the arguments of a network's forward"""
    mixes: ClassVar[bool] = False
    """whether a stage may ask for `MIXING` and drop_path"""
    outputs: ClassVar[tuple[str, ...]]
    """names, in exported files, of what comes out; of several also those that forward's result has them by"""

    def check(self, config: Config) -> None:
        """Refuse what cannot be carried out, on the config alone.

        Raises:
            ConfigError: a network for another task, or what the task itself asks for is not there.
        """
        if config.model.name not in self.networks:
            raise ConfigError(
                f"model={config.model.name}: cannot read dataset={config.dataset.name}, which is for "
                f"{', '.join(self.networks)}"
            )
        for key in (*MIXING, "drop_path") if config.training and not self.mixes else ():
            if value := getattr(config.stage, key):
                raise ConfigError(f"recipe.{config.mode}.{key}={value:g}: is for pictures, not for {self.name}")

    def tokenizer(self, config: Config) -> Any:
        """What data sets of text are read with; None: there is none."""
        return None

    @abstractmethod
    def network(self, config: Config, data: D | None, pretrained: bool = False) -> nn.Module:
        """The network without quantizers, on torch's default device.

        Args:
            config: resolved.
            data: that it is for; None: they are not read, and it is built by the config alone.
            pretrained: with the weights of its checkpoint, where the task has such.
        """

    def mixing(self, config: Config, data: D) -> Callable[[Batch, int, int], Batch] | None:
        """What is done to the training batches of an epoch, given both numbers; None: nothing. Only where `mixes`."""
        return None

    def knows_head(self, config: Config) -> bool:
        """Whether the config alone tells what the last layer of a network looks like."""
        return True

    def compute(self, model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
        """The model's logits for the inputs of a batch."""
        return joined(separate(model(*inputs), self.outputs))

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean over a batch, float32 [], of logits [N, ...] and targets [N, ...]; without autocast in float32, too."""

    @abstractmethod
    def distance(self, logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Mean distance, float32 [], of logits from a teacher's, both [N, ...], for distillation."""

    def objective(self) -> Objective:
        """What bits are chosen by: a batch's logits, and what is lost of them."""
        return of_loss(
            lambda model, batch: self.compute(model, batch.inputs),
            lambda logits, batch: (self.loss(logits, batch.targets), batch.targets.numel()),
        )

    @abstractmethod
    def predictions(self, logits: Tensor) -> Tensor:
        """What is predicted, from a finite number of values: two networks agree where it is the same.

        Of shape [M, ...], M being what is counted: samples, or parts of them that are right or wrong by themselves.
        """

    def right(self, predictions: Tensor, targets: Tensor) -> Tensor | None:
        """Whether each sample counts for the metric, bool [N]; None where the metric is no share of samples."""
        return None

    @abstractmethod
    def totals(self, device: torch.device) -> Totals:
        """Sums for a pass over training batches."""

    @abstractmethod
    def score(self, data: D) -> Totals:
        """Sums for a pass over all of `val_batches`; reading them gives the metric."""

    def longest(self, config: Config) -> int | None:
        """The second dimension of all inputs may be anything up to this; None: it is fixed."""
        return None

    def about(self, config: Config, data: D) -> dict[str, Any]:
        """What someone who uses an exported file must know of the inputs, as JSON values."""
        return {}


class Choice(Task[D]):
    """A task of choosing: logits [N, C] over C classes, or [N, C, d] for d choices; targets int64 [N] or [N, d]."""

    def loss(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Cross entropy; for shares of classes, float [N, C], as well."""
        return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)

    def distance(self, logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return divergence(logits, teacher, temperature, dim=1)

    def objective(self) -> Objective:
        return of_distributions(lambda model, batch: self.compute(model, batch.inputs), dim=1)

    def predictions(self, logits: Tensor) -> Tensor:
        """The classes of highest logit, int64 [N] or [N, d]."""
        return logits.argmax(1)


def separate(out: Any, names: Sequence[str]) -> tuple[Tensor, ...]:
    """What a network returned, as the tensors that exported files have: one, several, or fields of a result by name."""
    if isinstance(out, Tensor):
        return (out,)
    named = fields_of(out)
    return tuple(out if named is None else (named[name] for name in names))


def fields_of(out: Any) -> Mapping[str, Any] | None:
    """The fields of a result by name; None of a tensor, a tuple or a list, which have none."""
    if isinstance(out, Mapping):
        return out
    if hasattr(out, "_asdict"):
        return dict(out._asdict())
    return None if isinstance(out, Tensor | tuple | list) else vars(out)


def joined(outputs: Sequence[Tensor]) -> Tensor:
    """Logits: one output as it is; d outputs of shape [N, C] as [N, C, d]."""
    return outputs[0] if len(outputs) == 1 else torch.stack(list(outputs), dim=2)
