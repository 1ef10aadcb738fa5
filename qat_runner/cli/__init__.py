"""The commands: one thin file a verb. Here is only what must work before anything heavy is imported."""


def qat_run() -> int:
    """The `qat-run` command; returns its exit code."""
    try:
        from qat_runner.cli.run import main

        return main()
    except KeyboardInterrupt:  # while PyTorch was being imported
        return 130


def qat_export() -> int:
    """The `qat-export` command; returns its exit code."""
    try:
        from qat_runner.cli.export import main

        return main()
    except KeyboardInterrupt:  # while PyTorch was being imported
        return 130


def qat_report() -> int:
    """The `qat-report` command; returns its exit code."""
    try:
        from qat_runner.cli.report import main

        return main()
    except KeyboardInterrupt:
        return 130
