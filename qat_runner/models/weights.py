"""Loading weights into a model: from a file of any of the usual shapes, or torchvision's published ones."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from qat_runner.errors import ConfigError
from qat_runner.insertion.state import upgrade
from qat_runner.models.vision import TORCHVISION_MODELS

TORCHVISION = "torchvision"
"""The value of `weights` that means torchvision's published weights."""

SUFFIXES = (".pt", ".pth", ".th", ".safetensors")
_NESTED = ("state_dict", "model_state_dict", "model", "net", "module")
_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
_MIN_SHARE = 0.9  # of the model's tensors and of the file's: below, the file belongs to another network


@dataclass(frozen=True)
class Loaded:
    """How a file and a model matched, in tensors."""

    matched: int
    of_model: int
    left_fresh: tuple[str, ...]
    """tensors of the model that the file did not fill"""

    def __str__(self) -> str:
        rest = f"; left as initialized: {', '.join(self.left_fresh)}" if self.left_fresh else ""
        return f"{self.matched} of {self.of_model} tensors loaded{rest}"


def find_weights(weights: str, model_name: str) -> None:
    """Refuse, before any work, weights that cannot be there.

    Raises:
        ConfigError: no such file, an unknown suffix, no published weights for the model.
    """
    if weights == TORCHVISION:
        if model_name not in TORCHVISION_MODELS:
            raise ConfigError(
                f"weights=torchvision: there are none for {model_name}, only for {', '.join(TORCHVISION_MODELS)}"
            )
        return
    if not Path(weights).is_file():
        raise ConfigError(f"weights={weights}: no such file")
    if Path(weights).suffix not in SUFFIXES:
        raise ConfigError(f"weights={weights}: must end in {', '.join(SUFFIXES)}")


def load_weights(model: nn.Module, weights: str, model_name: str, new_head: bool, quantizers: bool = False) -> Loaded:
    """Load weights into a model: what `match_weights` finds."""
    state, loaded = match_weights(model, weights, model_name, new_head, quantizers)
    model.load_state_dict(state)
    return loaded


def match_weights(
    model: nn.Module, weights: str, model_name: str, new_head: bool, quantizers: bool = False
) -> tuple[dict[str, Tensor], Loaded]:
    """Match weights with a model by name, wrappers' prefixes stripped, nested state dicts found.

    Args:
        model: the model, with or without quantizers, on any device.
        weights: a path, or "torchvision".
        model_name: its name among MODELS.
        new_head: whether the last layer may keep its initialization where the file's has another number of classes.
        quantizers: whether quantizers become what they were in the file, where it has the same ones; otherwise they
            stay as they are.

    Returns:
        A state dict for the model, and what matched.

    Raises:
        ConfigError: the file is unreadable, holds no tensors, or is another network's; the message counts what matched.
    """
    found = read_weights(weights, model_name)
    wanted = model.state_dict()
    fitting = _fitting_quantizers(found, wanted) if quantizers else {}
    found = {key: t for key, t in found.items() if not _is_quantizer_key(key)} | fitting
    # Bookkeeping of BatchNorm that older files lack, and quantizers' state: welcome, but never missed.
    optional = {key for key in {*wanted, *found} if key.endswith("num_batches_tracked") or _is_quantizer_key(key)}
    usable = {key: t for key, t in found.items() if key in wanted and t.shape == wanted[key].shape}
    clashing = [key for key in wanted if key in found and key not in usable]
    missing = [key for key in wanted if key not in found and key not in optional]
    counted = [key for key in usable if key not in optional]
    of_model = len(wanted.keys() - optional)
    of_file = len(found.keys() - optional)
    share = min(len(counted) / max(of_model, 1), len(counted) / max(of_file, 1))
    head = set(_head_keys(model)) if new_head else set()
    if share < _MIN_SHARE:
        raise ConfigError(
            f"weights={weights}: little matches, {len(counted)} of the {of_model} tensors of {model_name} "
            f"and of the {of_file} in the file; it must be a file for {model_name}"
        )
    wrong = [key for key in [*clashing, *missing] if key not in head]
    if wrong:
        key = wrong[0]
        why = f"has shape {list(found[key].shape)}, not {list(wanted[key].shape)}" if key in found else "is missing"
        hint = "; model.stem=imagenet keeps the published network" if weights == TORCHVISION else ""
        raise ConfigError(
            f"weights={weights}: tensor {key} {why} ({len(wrong)} such); it must be a file for {model_name}{hint}"
        )
    state = {key: t for key, t in wanted.items() if not _is_quantizer_key(key)} | usable
    return state, Loaded(len(counted), of_model, (*clashing, *missing))


def read_weights(weights: str, model_name: str) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU, without wrappers' prefixes; or torchvision's published ones.

    Raises:
        ConfigError: the file is unreadable or holds no tensors; the published weights cannot be had.
    """
    if weights == TORCHVISION:
        try:  # the first published version: the classic recipe, which the paper's baselines share
            published = torchvision.models.get_model_weights(model_name)["IMAGENET1K_V1"]
            return dict(published.get_state_dict(progress=False, check_hash=True))
        except Exception as error:
            raise ConfigError(f"weights=torchvision: download failed ({type(error).__name__}: {error})") from error
    try:
        content: Any = (
            load_file(weights)
            if weights.endswith(".safetensors")
            else torch.load(weights, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # whatever a parser may raise on a file that is something else
        reason = f"{type(error).__name__}: {error}".splitlines()[0].partition(". ")[0]
        raise ConfigError(f"weights={weights}: not a readable weights file ({reason})") from error
    tensors = _tensors(content)
    if not tensors:
        raise ConfigError(f"weights={weights}: holds no named tensors")
    return tensors


def _tensors(content: Any) -> dict[str, Tensor]:
    """The state dict in what a file held, however deeply nested, with plain names."""
    if isinstance(content, dict) and isinstance(content.get("state"), dict) and isinstance(content.get("model"), dict):
        content = upgrade(content)
    while isinstance(content, Mapping):
        nested = next((content[key] for key in _NESTED if isinstance(content.get(key), Mapping)), None)
        if nested is None:
            break
        content = nested
    if not isinstance(content, Mapping):
        return {}
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    for prefix in _WRAPPERS * 2:
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _is_quantizer_key(key: str) -> bool:
    return re.search(r"(^|\.)\w+_quantizer\.", key) is not None


def _fitting_quantizers(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of those quantizers in the file that have the same bits and granularity in the model."""
    fitting: dict[str, Tensor] = {}
    for name in {key.rpartition(".")[0] for key in found if _is_quantizer_key(key)}:
        state = {key: t for key, t in found.items() if key.rpartition(".")[0] == name}
        same_shapes = all(key in wanted and t.shape == wanted[key].shape for key, t in state.items())
        bits = f"{name}.grid"
        if same_shapes and bits in state and round(float(state[bits][0])) == round(float(wanted[bits][0])):
            fitting |= state
    return fitting


def _head_keys(model: nn.Module) -> list[str]:
    """Names of the parameters of the last linear layer."""
    name = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    return [f"{name}.{parameter}" for parameter, _ in model.get_submodule(name).named_parameters(recurse=False)]
