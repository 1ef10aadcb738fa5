"""Run `qat-run` in the folder of a test."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from qat_runner.cli.run import main

Run = Callable[..., int]
"""A function from the arguments of a command to its exit code."""


def run_in(folder: Path, monkeypatch: pytest.MonkeyPatch, overrides: Sequence[str]) -> Run:
    """Return `qat-run` in a folder, with `overrides` before its own arguments, but after -m."""
    monkeypatch.chdir(folder)
    return lambda *args: main([*args[: args[0] == "-m"], *overrides, *args[args[0] == "-m" :]])
