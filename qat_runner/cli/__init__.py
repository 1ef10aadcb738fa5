"""The commands: one thin file a verb. Here is only what must work before anything heavy is imported."""

import codecs
import io
import os
import sys


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

        code = main()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
