"""Tasks, their facts and their data sets refer to each other by the same names."""

from dataclasses import asdict

import pytest
import yaml

from qat_runner.config import Config, config_dir, flat
from qat_runner.config.schema import STAGES
from qat_runner.config.tasks import FACTS, foreign_keys
from qat_runner.data import DATASETS
from qat_runner.tasks import TASKS


def test_each_task_has_its_facts() -> None:
    assert {name: task.facts for name, task in TASKS.items()} == FACTS
    assert all(task.name == name for name, task in TASKS.items())


@pytest.mark.parametrize("name", FACTS)
def test_facts_are_of_the_schema(name: str) -> None:
    facts = FACTS[name]
    assert facts.own_keys <= flat(asdict(Config())).keys()
    assert {*facts.modes} <= {*STAGES}
    assert not foreign_keys(facts) & facts.own_keys


def test_each_data_set_has_a_file_of_its_name_and_its_task() -> None:
    files = {path.stem: yaml.safe_load(path.read_text()) for path in (config_dir() / "dataset").glob("*.yaml")}
    assert {name: (name, dataset.task) for name, dataset in DATASETS.items()} == {
        name: (content["name"], content["task"]) for name, content in files.items()
    }
    assert {dataset.task for dataset in DATASETS.values()} == TASKS.keys()
