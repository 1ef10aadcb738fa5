"""The config of a run: its schema, what follows from the rest, what is refused, and which runs are the same."""

from qat_runner.config.fingerprints import path_of
from qat_runner.config.groups import config_dir, register
from qat_runner.config.identities import (
    CONFIG_FILE,
    clipping_label,
    differences,
    flat,
    gradient_label,
    identity,
    load_config,
    read_config,
    run_folder,
    run_name,
    settings,
)
from qat_runner.config.resolving import baseline_of, check, from_hydra, resolve, scaled_lr
from qat_runner.config.schema import (
    BASELINE,
    TORCHVISION,
    ClippingConfig,
    Config,
    DatasetConfig,
    GradientConfig,
    ModelConfig,
    RecipeConfig,
    StageConfig,
)

__all__ = [
    "BASELINE",
    "CONFIG_FILE",
    "TORCHVISION",
    "ClippingConfig",
    "Config",
    "DatasetConfig",
    "GradientConfig",
    "ModelConfig",
    "RecipeConfig",
    "StageConfig",
    "baseline_of",
    "check",
    "clipping_label",
    "config_dir",
    "differences",
    "flat",
    "from_hydra",
    "gradient_label",
    "identity",
    "load_config",
    "path_of",
    "read_config",
    "register",
    "resolve",
    "run_folder",
    "run_name",
    "scaled_lr",
    "settings",
]
