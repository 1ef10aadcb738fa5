"""What a library of networks must be able to do, so that a word such as timm/NAME is enough to have one of them."""

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from qat_runner.errors import ConfigError


@dataclass(frozen=True)
class Preprocessing:
    """What the published weights of a network were validated on, as their library describes it."""

    image_size: int
    """pixels a side of the crop"""
    resize_size: int
    """pixels of the shorter side that it is the centre of"""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """of values in 0..1, a number a channel"""
    interpolation: str
    """nearest, bilinear or bicubic"""

    def keys(self) -> dict[str, Any]:
        """The keys of `dataset` that say so."""
        return {**vars(self), "mean": list(self.mean), "std": list(self.std)}


class Library(ABC):
    """Networks that somebody else publishes, from pictures [N, 3, H, W] to logits [N, classes]."""

    prefix: ClassVar[str]
    """of its words: PREFIX/NAME"""

    @abstractmethod
    def names(self) -> Sequence[str]:
        """All names that there are; none where they are not known here."""

    def check(self, name: str) -> None:
        """Refuse a name that there is not.

        Raises:
            ConfigError: with the nearest that there are.
        """
        if name in self.names():
            return
        close = difflib.get_close_matches(name, self.names(), n=3)
        hint = f"; did you mean {' or '.join(f'{self.prefix}/{other}' for other in close)}?" if close else ""
        raise ConfigError(f"model={self.prefix}/{name}: there is none of this name{hint}")

    @abstractmethod
    def build(self, name: str, num_classes: int, image_size: int, drop_path: float | None) -> nn.Module:
        """The network, freshly initialized by torch's global random state, on torch's default device.

        Args:
            name: without the prefix.
            num_classes: number of logits.
            image_size: pixels a side, for a network that must know.
            drop_path: chance that a residual branch is left out in training, of the last block, rising linearly to it;
                None: as the library has it.

        Raises:
            ValueError: it cannot be had so.
        """

    @abstractmethod
    def has_weights(self, name: str) -> bool:
        """Whether weights are published, as far as that is known without asking for them."""

    @abstractmethod
    def published(self, name: str, image_size: int) -> tuple[str, dict[str, Tensor]]:
        """What the published weights are called, and a state dict of them, on the CPU.

        Positions are resampled to `image_size`, unless it is 0, where the library can. What is not published is not
        in it.

        Raises:
            ConfigError: there are none.
            Exception: whatever a download raises.
        """

    @abstractmethod
    def preprocessing(self, name: str) -> Preprocessing:
        """Raises:
        ConfigError: it is not described.
        """


def cannot_drop(name: str) -> ValueError:
    return ValueError(f"a stage's drop_path is not for {name}, which cannot leave out residual branches at random")


_INTERPOLATIONS = {"nearest": "nearest", "bilinear": "bilinear", "bicubic": "bicubic", "lanczos": "bicubic"}


def interpolation(name: str) -> str:
    """A library's word for an interpolation -> ours: the nearest where we have none (lanczos, random)."""
    return _INTERPOLATIONS.get(name, "bilinear")


def resized(image_size: int, crop_ratio: float) -> int:
    """Pixels of the shorter side, as timm rounds them."""
    return math.floor(image_size / crop_ratio)
