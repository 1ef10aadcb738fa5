"""Running `qat-run` in a folder of a test."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from qat_runner.cli.run import main

Run = Callable[..., int]
"""Arguments of a command -> its exit code."""


def run_in(folder: Path, monkeypatch: pytest.MonkeyPatch, overrides: Sequence[str]) -> Run:
    """`qat-run` in a folder, with overrides in front of those that it is given, and behind -m."""
    monkeypatch.chdir(folder)
    return lambda *args: main([*args[: args[0] == "-m"], *overrides, *args[args[0] == "-m" :]])
