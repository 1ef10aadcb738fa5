"""Which configs Hydra composes from: those that are shipped, the schema, and those of installed packages.

An installed package adds to the groups by a folder of YAML files of its own, laid out like ours:

    [project.entry-points."qat_runner.configs"]
    my_package = "my_package.configs"

so that my_package/configs/dataset/mine.yaml is `dataset=mine`. A clipping method, a gradient estimator or a model that
needs no more than its name has an option without a file.
"""

import re
from importlib.resources import as_file, files
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from qat_runner.config.schema import ConfigSchema
from qat_runner.errors import ConfigError, told
from qat_runner.plugins import installed
from qat_runner.quant import GRADIENTS, METHODS

GROUP, MODELS = "qat_runner.configs", "qat_runner.models"
"""Of entry points."""

_PACKAGE = re.compile(r"# @package (\S+)")


def config_dir() -> Path:
    """The folder of the shipped configs: inside the package where it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next(path for path in (package / "configs", package.parent / "configs") if path.is_dir())


def register() -> None:
    """Make the schema, as config `schema`, and all that is not shipped known to Hydra.

    Raises:
        ConfigError: configs of an installed package cannot be read, or would take the place of ours.
    """
    store = ConfigStore.instance()
    store.__dict__["__deepcopy__"] = _not_copied
    if "schema.yaml" not in store.repo:  # it takes longer than all the rest, and is the same ever after
        store.store(name="schema", node=ConfigSchema)
    for group, names in (("clipping", METHODS), ("gradient", GRADIENTS), ("model", installed(MODELS))):
        for name in names:
            if not (config_dir() / group / f"{name}.yaml").is_file():
                store.store(group=group, name=name, node={"name": name})
    for point in installed(GROUP).values():
        try:
            with as_file(files(point.value)) as folder:
                _store(folder)
        except ConfigError:
            raise
        except Exception as error:  # whatever somebody's package may raise
            raise ConfigError(f"configs of {point.name} ({point.value}) cannot be read ({told(error)})") from error


def _not_copied(memo: object) -> ConfigStore:
    """The store, in place of a copy: there is one, and it gives away copies alone.

    Hydra copies its sources whenever it composes, and for `--help` a hundred times: with the store, that was half of
    the time it took.
    """
    return ConfigStore.instance()


def _store(folder: Path) -> None:
    """All YAML files below a folder, each under the group that its place says."""
    for file in sorted(folder.rglob("*.yaml")):
        place = file.relative_to(folder)
        if (config_dir() / place).is_file():
            raise ConfigError(f"{file}: {place} is among the shipped configs already; another name is free")
        package = _PACKAGE.match(file.read_text(encoding="utf-8"))
        ConfigStore.instance().store(
            group=place.parent.as_posix(),
            name=place.stem,
            node=OmegaConf.load(file),
            package=package.group(1) if package else None,
        )
