"""The commands: one thin file a verb. Here is only what must work before anything heavy is imported."""

import codecs
import sys
from io import TextIOWrapper


def _speak_utf8() -> None:
    """Let whatever is said reach the terminal, under any locale: UTF-8 where that has but ASCII, or else escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            encoding = "utf-8" if codecs.lookup(stream.encoding).name == "ascii" else stream.encoding
            stream.reconfigure(encoding=encoding, errors="backslashreplace")


def qat_run() -> int:
    """The `qat-run` command; returns its exit code."""
    _speak_utf8()
    try:
        from qat_runner.cli.run import main

        return main()
    except KeyboardInterrupt:  # while PyTorch was being imported
        return 130


def qat_export() -> int:
    """The `qat-export` command; returns its exit code."""
    _speak_utf8()
    try:
        from qat_runner.cli.export import main

        return main()
    except KeyboardInterrupt:  # while PyTorch was being imported
        return 130


def qat_report() -> int:
    """The `qat-report` command; returns its exit code."""
    _speak_utf8()
    try:
        from qat_runner.cli.report import main

        return main()
    except KeyboardInterrupt:
        return 130
