"""The commands, one thin module each. This module holds only what must work before anything slow is imported."""

import codecs
import io
import os
import sys
from contextlib import suppress
from importlib import import_module
from typing import TextIO


def _names(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


def _speak_utf8() -> None:
    """Make every message printable under any locale: use UTF-8 if the locale has only ASCII, and escape the rest.

    File names that are not valid text are printed as raw bytes.
    """
    codecs.register_error("names", _names)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encoding = "utf-8" if codecs.lookup(stream.encoding).name == "ascii" else stream.encoding
            stream.reconfigure(encoding=encoding, errors="names")


def silence(stream: TextIO) -> None:
    """Discard all output to a stream that nobody reads any more, including what is still buffered."""
    with suppress(OSError):  # it may have no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _command(name: str) -> int:
    """Import a command with all its dependencies and run it; if a dependency is missing, print which extra to install.

    Args:
        name: name of the command's module in this package, and of the extra with its dependencies.
    """
    _speak_utf8()
    try:
        code: int = import_module(f"qat_runner.cli.{name}").main()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader closed the pipe
        silence(sys.stdout)
        return 0
    except KeyboardInterrupt:  # while PyTorch was being imported
        return 130
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _OF_EXTRAS:
            raise
        extra = _OF_EXTRAS[package] or {"bits": "run"}.get(name, name)
        print(f"qat-{name}: {package} is not installed; pip install 'qat_runner[{extra}]' installs it", file=sys.stderr)
        return 2


_OF_EXTRAS = {
    **dict.fromkeys(("PIL", "hydra", "matplotlib", "numpy", "omegaconf", "pydantic", "safetensors", "scipy")),
    **dict.fromkeys(("sklearn", "tabulate", "tensorboard", "torchvision", "tqdm", "typing_extensions", "yaml")),
    "jinja2": "report",
    "pyarrow": "parquet",
    "timm": "timm",
    "transformers": "text",
}
"""Imported package -> the extra that installs it; None: the extra of each command installs it."""


def qat_run() -> int:
    """Run the `qat-run` command and return its exit code."""
    return _command("run")


def qat_bits() -> int:
    """Run the `qat-bits` command and return its exit code."""
    return _command("bits")


def qat_export() -> int:
    """Run the `qat-export` command and return its exit code."""
    return _command("export")


def qat_report() -> int:
    """Run the `qat-report` command and return its exit code."""
    return _command("report")
