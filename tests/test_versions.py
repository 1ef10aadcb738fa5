"""Configs of other versions: what identifies a run, and how its name follows from that."""

import functools
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from qat_runner.config import (
    Config,
    StageConfig,
    identity,
    read_config,
    run_folder,
    run_name,
)
from qat_runner.config import versions as v
from qat_runner.config.schema import ConfigSchema
from qat_runner.errors import ConfigError, UnreadableError
from tests.conftest import Compose

SHIPPED = sorted((Path(__file__).resolve().parents[1] / "docs/results").rglob("configs/*.yaml"))
"""The configs of the runs whose results the docs show, as these runs wrote them (versions 1 and later)."""


read_shipped = functools.cache(read_config)


def write(folder: Path, config: Config | dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    content = OmegaConf.structured(config) if isinstance(config, Config) else OmegaConf.create(config)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(content))
    return folder


def raw(config: Config) -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_keeps_its_name(path: Path) -> None:
    assert run_name(read_shipped(path)) == path.stem


def test_shipped_configs_are_many_and_all_different() -> None:
    assert len(SHIPPED) >= 90
    assert len({str(identity(read_shipped(path))) for path in SHIPPED}) == len(SHIPPED)


def test_every_key_with_a_default_has_its_first_one_on_record() -> None:
    def keys(schema: Any, prefix: str = "") -> Iterator[str]:
        for field in fields(schema):
            if is_dataclass(field.default_factory):
                yield from keys(field.default_factory, f"{prefix}{field.name}.")
            elif field.default_factory is not MISSING or field.default not in (MISSING, "???"):
                yield prefix + field.name

    always_in = {"mode", "bits", "data_dir", "runs_dir", "schema_version"}
    assert {*keys(ConfigSchema)} - always_in == v.FIRST_DEFAULTS.keys()
    assert {*keys(StageConfig)} == v.FIRST_DEFAULTS_OF_STAGE.keys()


def test_a_key_or_a_default_that_comes_later_renames_nothing(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed("mode=ptq", "weights=w.pt")
    old = raw(config)
    del (
        old["quantize_head"],
        old["log_excess_mse"],
        old["dataset"]["skip_corrupt"],
        old["recipe"]["retrain"]["nesterov"],
    )
    again = read_config(write(tmp_path / "old", old) / "config.yaml")
    assert (identity(again), run_name(again)) == (identity(config), run_name(config))
    assert composed("mode=ptq", "weights=w.pt", "quantize_head=true") != config
    monkeypatch.setattr(v, "FIRST_DEFAULTS", v.FIRST_DEFAULTS | {"amp": "bf16"})  # as if this had been the default
    del old["amp"]
    assert read_config(write(tmp_path / "older", old) / "config.yaml").amp == "bf16"


def test_values_that_are_not_the_first_defaults_are_in_the_identity(composed: Compose) -> None:
    plain, other = composed(), composed("amp=bf16", "quantize_head=false", "recipe.scratch.nesterov=true")
    line = {"amp": "bf16", "quantize_head": False, "recipe.nesterov": True}
    assert identity(other) == identity(plain) | line
    assert run_name(other) != run_name(plain)
    bert = composed("dataset=squad", "model=bert_base")
    assert "first_last_bits" not in identity(bert)
    assert identity(composed("dataset=squad", "model=bert_base", "first_last_bits=8")) != identity(bert)


def test_configs_of_version_1(composed: Compose, tmp_path: Path) -> None:
    now = composed("mode=ptq", "weights=w.pt", "clipping.eval_mode=last", "batch_size=512")
    old = raw(now)
    del old["schema_version"], old["clipping"]["calibration_batch_size"]
    old["clipping"]["eval_mode"] = "frozen"
    read = read_config(write(tmp_path / "one", old) / "config.yaml")
    assert (read.schema_version, read.clipping.eval_mode, read.clipping.calibration_batch_size) == (1, "last", 512)
    assert identity(read) == identity(replace(now, clipping=replace(now.clipping, calibration_batch_size=512)))


@pytest.mark.parametrize(("dataset", "model"), [("squad", "bert_base"), ("digits", "resnet20")])
def test_configs_from_before_data_sets_named_their_task(
    composed: Compose, tmp_path: Path, dataset: str, model: str
) -> None:
    now = composed(f"dataset={dataset}", f"model={model}")
    old = raw(now)
    del old["dataset"]["task"]
    read = read_config(write(tmp_path / "old", old) / "config.yaml")
    assert (read.dataset.task, run_name(read)) == (now.dataset.task, run_name(now))


def test_a_revised_method_makes_a_different_run(composed: Compose, tmp_path: Path) -> None:
    for clipping, same in (("pact", False), ("lsq", True)):
        now = composed(f"clipping={clipping}", "mode=retrain", "weights=w.pt")
        old = raw(now) | {"schema_version": 1}
        assert (identity(read_config(write(tmp_path / clipping, old) / "config.yaml")) == identity(now)) == same


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": v.SCHEMA_VERSION + 1}, "a later qat_runner wrote this file"),
        ({"schema_version": "two"}, "schema_version=two: must be 1 to"),
        ({"colour": "red"}, r"\(colour: unknown key\)"),
        ({"epochs": "many"}, "epochs: input should be a valid integer"),
    ],
)
def test_unreadable_configs_are_reported(
    composed: Compose, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path / "run", raw(composed()) | change)
    with pytest.raises(UnreadableError, match=message):
        read_config(folder / "config.yaml")


@pytest.mark.parametrize("text", ["{half: [", "- a\n- b\n", "", "\0"])
def test_files_that_are_not_configs_are_reported(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UnreadableError, match=r"config\.yaml: cannot be read"):
        read_config(tmp_path / "config.yaml")


def test_the_version_cannot_be_set(composed: Compose) -> None:
    with pytest.raises(ConfigError, match=f"schema_version=1: must be {v.SCHEMA_VERSION}"):
        composed("schema_version=1")


def test_a_folder_that_an_earlier_version_named_is_used(composed: Compose, tmp_path: Path) -> None:
    config = composed(f"runs_dir={tmp_path}")
    words = run_name(config).rpartition("_")[0]
    assert run_folder(config) == tmp_path / run_name(config)
    (write(tmp_path / f"{words}_00000000", composed("amp=bf16")) / "x").touch()
    (tmp_path / f"{words}_11111111").mkdir()
    (tmp_path / f"{words}_11111111/config.yaml").write_text("{")
    assert run_folder(config) == tmp_path / run_name(config)
    earlier = write(tmp_path / f"{words}_22222222", raw(config) | {"schema_version": 1})
    assert run_folder(config) == earlier
    assert run_folder(replace(config, run_dir="~/here")) == Path.home() / "here"
