"""The configs that Hydra composes from: the shipped ones, the schema, and those of installed packages.

An installed package adds options to the groups with its own folder of YAML files, laid out like `configs/`:

    [project.entry-points."qat_runner.configs"]
    my_package = "my_package.configs"

With it, my_package/configs/dataset/mine.yaml is `dataset=mine`. A clipping method, a gradient estimator or a model that
needs only its name gets an option without a file.
"""

import re
from importlib.resources import as_file, files
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from qat_runner.config.schema import ConfigSchema
from qat_runner.errors import ConfigError, one_line
from qat_runner.plugins import installed
from qat_runner.quant import GRADIENTS, METHODS

GROUP, MODELS = "qat_runner.configs", "qat_runner.models"
"""Groups of entry points."""

_PACKAGE = re.compile(r"# @package (\S+)")


def config_dir() -> Path:
    """The folder of the shipped configs: inside an installed package, or next to the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next(path for path in (package / "configs", package.parent / "configs") if path.is_dir())


def register() -> None:
    """Register with Hydra the schema, as config `schema`, and all options that are not shipped as files.

    Raises:
        ConfigError: configs of an installed package cannot be read, or have the name of a shipped config.
    """
    store = ConfigStore.instance()
    store.__dict__["__deepcopy__"] = _not_copied
    if "schema.yaml" not in store.repo:  # only once: it takes longer than all the rest, and never changes
        store.store(name="schema", node=ConfigSchema)
    for group, names in options_in_code():
        for name in names:
            if not (config_dir() / group / f"{name}.yaml").is_file():
                store.store(group=group, name=name, node={"name": name})
    for point in installed(GROUP).values():
        try:
            with as_file(files(point.value)) as folder:
                _store(folder)
        except ConfigError:
            raise
        except Exception as error:  # another package may raise anything
            raise ConfigError(f"configs of {point.name} ({point.value}) cannot be read ({one_line(error)})") from error


def options_in_code() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the groups whose options need no file, each with the names of those that this process knows."""
    return ("clipping", tuple(METHODS)), ("gradient", tuple(GRADIENTS)), ("model", tuple(installed(MODELS)))


def _not_copied(memo: object) -> ConfigStore:
    """Return the store itself instead of a copy. This is safe because the store only hands out copies.

    Hydra copies its sources whenever it composes, which it does a hundred times for `--help`. Copying the store took
    half of that time.
    """
    return ConfigStore.instance()


def _store(folder: Path) -> None:
    """Register all YAML files below a folder, each in the group given by its path."""
    for file in sorted(folder.rglob("*.yaml")):
        place = file.relative_to(folder)
        if (config_dir() / place).is_file():
            raise ConfigError(f"{file}: must have another name, since {place} is a shipped config")
        package = _PACKAGE.match(file.read_text(encoding="utf-8"))
        ConfigStore.instance().store(
            group=place.parent.as_posix(),
            name=place.stem,
            node=OmegaConf.load(file),
            package=package.group(1) if package else None,
        )
