"""The interface of a library of networks, whose networks are selected by one name such as timm/NAME."""

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
    """The preprocessing with which a network's published weights were validated, as described by their library."""

    image_size: int
    """side length of the crop in pixels"""
    resize_size: int
    """shorter side, in pixels, of the resized image from which the center crop is taken"""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """mean and std of values in 0..1, one number per channel"""
    interpolation: str
    """nearest, bilinear or bicubic"""

    def keys(self) -> dict[str, Any]:
        """Return the preprocessing as keys of `dataset`."""
        return {**vars(self), "mean": list(self.mean), "std": list(self.std)}


class Library(ABC):
    """A library that publishes networks from images [N, 3, H, W] to logits [N, classes]."""

    prefix: ClassVar[str]
    """prefix of its model names, PREFIX/NAME"""

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Return the names of all networks; empty if they are not known locally."""

    def check(self, name: str) -> None:
        """Check that a network exists.

        Raises:
            ConfigError: it does not; the message suggests the most similar names.
        """
        if name in self.names():
            return
        close = difflib.get_close_matches(name, self.names(), n=3)
        hint = f"; did you mean {' or '.join(f'{self.prefix}/{other}' for other in close)}?" if close else ""
        raise ConfigError(f"model={self.prefix}/{name}: there is no network with this name{hint}")

    @abstractmethod
    def build(self, name: str, num_classes: int, image_size: int, drop_path: float | None) -> nn.Module:
        """Build a network on torch's default device, with weights initialized from torch's global random state.

        Args:
            name: name of the network, without the prefix.
            num_classes: number of logits.
            image_size: side length of the images in pixels, for networks that depend on it.
            drop_path: stochastic depth: probability that the residual branch of the last block is dropped in training;
                it rises linearly from block to block up to this value. None: the default of the library.

        Raises:
            ValueError: the network does not support the options.
        """

    @abstractmethod
    def has_weights(self, name: str) -> bool:
        """Return whether weights are published, as far as this is known without a download."""

    @abstractmethod
    def published(self, name: str, image_size: int) -> tuple[str, dict[str, Tensor]]:
        """Return the name of the published weights, and their state dict on the CPU.

        Position embeddings are resampled to `image_size`, unless it is 0, if the library supports it. The state dict
        contains only tensors that are published.

        Raises:
            ConfigError: there are no published weights.
            Exception: any exception that a download raises.
        """

    @abstractmethod
    def preprocessing(self, name: str) -> Preprocessing:
        """Return the preprocessing with which the published weights were validated.

        Raises:
            ConfigError: the library does not describe it.
        """


def cannot_drop(name: str) -> ValueError:
    return ValueError(f"{name} does not support the drop_path of a stage (stochastic depth)")


_INTERPOLATIONS = {"nearest": "nearest", "bilinear": "bilinear", "bicubic": "bicubic", "lanczos": "bicubic"}


def interpolation(name: str) -> str:
    """Map a library's name of an interpolation to a value of `dataset.interpolation`.

    Interpolations without an exact match (lanczos, random) are mapped to the closest one.
    """
    return _INTERPOLATIONS.get(name, "bilinear")


def resized(image_size: int, crop_ratio: float) -> int:
    """Return the shorter side of the resized image in pixels, rounded as in timm."""
    return math.floor(image_size / crop_ratio)
