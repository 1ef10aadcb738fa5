"""Run `qat-run` in the folder of a test."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from qat_runner.cli.run import main
from qat_runner.config.schema import OF_STAGE

Run = Callable[..., int]
"""A function from the arguments of a command to its exit code."""


def run_in(folder: Path, monkeypatch: pytest.MonkeyPatch, overrides: Sequence[str]) -> Run:
    """Return `qat-run` in a folder, with `overrides` before its own arguments, but after -m.

    Those of `overrides` that apply only to training are left out for modes that do not train.
    """
    monkeypatch.chdir(folder)

    def run(*args: str) -> int:
        idle = any(arg in ("mode=ptq", "mode=evaluate") for arg in args)
        usual = [word for word in overrides if not (idle and word.partition("=")[0] in OF_STAGE)]
        return main([*args[: args[0] == "-m"], *usual, *args[args[0] == "-m" :]])

    return run
