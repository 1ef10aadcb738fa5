"""Models by name, and their weights."""

from qat_runner.models.vision import MODELS, STEMS, build_model
from qat_runner.models.weights import TORCHVISION, Loaded, find_weights, load_weights, match_weights

__all__ = ["MODELS", "STEMS", "TORCHVISION", "Loaded", "build_model", "find_weights", "load_weights", "match_weights"]
