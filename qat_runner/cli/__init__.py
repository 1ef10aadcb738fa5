"""The commands: one thin file a verb. Here is only what must work before anything heavy is imported."""

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
    """Let whatever is said reach the terminal, under any locale: UTF-8 where that has but ASCII, or else escaped.

    A name of a file that is no text is printed as it is.
    """
    codecs.register_error("names", _names)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encoding = "utf-8" if codecs.lookup(stream.encoding).name == "ascii" else stream.encoding
            stream.reconfigure(encoding=encoding, errors="names")


def silence(stream: TextIO) -> None:
    """Let nothing of a stream that nobody reads any more go anywhere, what it still holds included."""
    with suppress(OSError):  # it may have no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _command(name: str) -> int:
    """Import a command, and all that is heavy with it, and carry it out; or say which extra its installation lacks.

    Args:
        name: of its module here, and of the extra that has all it needs.
    """
    _speak_utf8()
    try:
        code: int = import_module(f"qat_runner.cli.{name}").main()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read it has seen enough
        silence(sys.stdout)
        return 0
    except KeyboardInterrupt:  # while PyTorch was being imported
        return 130
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _OF_EXTRAS:
            raise
        extra = _OF_EXTRAS[package] or {"bits": "run"}.get(name, name)
        print(f"qat-{name}: {package} is not installed; pip install 'qat_runner[{extra}]' brings it", file=sys.stderr)
        return 2


_OF_EXTRAS = {
    **dict.fromkeys(("PIL", "hydra", "matplotlib", "numpy", "omegaconf", "pydantic", "safetensors", "scipy")),
    **dict.fromkeys(("sklearn", "tabulate", "tensorboard", "torchvision", "tqdm", "typing_extensions", "yaml")),
    "jinja2": "report",
    "pyarrow": "parquet",
    "timm": "timm",
    "transformers": "text",
}
"""Package as it is imported -> the extra that brings it; None: the extra of each command does."""


def qat_run() -> int:
    """The `qat-run` command; returns its exit code."""
    return _command("run")


def qat_bits() -> int:
    """The `qat-bits` command; returns its exit code."""
    return _command("bits")


def qat_export() -> int:
    """The `qat-export` command; returns its exit code."""
    return _command("export")


def qat_report() -> int:
    """The `qat-report` command; returns its exit code."""
    return _command("report")
