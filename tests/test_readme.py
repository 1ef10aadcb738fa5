"""What the README shows works: its Python runs, its qat-run commands compose."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from qat_runner.cli.run import HYDRA_VERSION_BASE, _rows_of_experiment, config_dir
from qat_runner.config import from_hydra, register

TEXT = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_commands_compose() -> None:
    commands = [
        shlex.split(line, comments=True)[1:]
        for block in blocks("bash")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("qat-run ")
    ]
    assert len(commands) >= 6
    register()
    for words in commands:
        words += _rows_of_experiment(words, multirun=True)
        overrides = OverridesParser.create().parse_overrides([w for w in words if "=" in w])
        with initialize_config_dir(str(config_dir()), version_base=HYDRA_VERSION_BASE):
            for row in BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]:
                from_hydra(compose("config", overrides=list(row)))


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).resolve().parents[1] / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", TEXT):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
