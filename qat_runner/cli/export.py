"""qat-export: export a trained network with integer weights to files that other software can run.

    qat-export runs/NAME                       ONNX, torch.export and safetensors, in runs/NAME/export
    qat-export runs/NAME --scalars calibrated  make the clipping scalars of activations static by another rule
    qat-export runs/NAME --compare             only report the accuracy under each rule
    qat-export runs/NAME --formats onnx        only one file

Training solved for the clipping scalars of activations on each batch. These rules make them static: averaged over
training batches in the quantized network; calibrated in the full-precision network (static-OCTAV); running, the running
average of training. Runs with static or learned scalars keep them.

Every file is run on the validation set, and is kept only if it gives the results of the network. Exit codes: 0 success,
1 a file failed this check, 2 the command cannot be carried out.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import qat_runner
from qat_runner.cli.terminal import on_terminal
from qat_runner.errors import ConfigError, QatError, os_error_message
from qat_runner.exporting import FORMATS
from qat_runner.policy import FREEZING

CHECKPOINTS = ("last", "previous", "best")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        "qat-export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {qat_runner.__version__}")
    parser.add_argument("run_dir", type=Path, help="folder of a trained run")
    parser.add_argument("--out", type=Path, help="output folder (default: RUN_DIR/export)")
    parser.add_argument(
        "--scalars", choices=FREEZING, help="rule for the clipping scalars of activations (default: averaged)"
    )
    parser.add_argument("--batches", type=int, default=10, help="number of training batches for the rule (default: 10)")
    parser.add_argument(
        "--checkpoint", choices=CHECKPOINTS, default="last", help="checkpoint to export (default: last)"
    )
    parser.add_argument("--no-fold", action="store_true", help="do not fold BatchNorm into convolutions")
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="files to write (default: all)"
    )
    parser.add_argument("--compare", action="store_true", help="write nothing, report the accuracy under each rule")
    args = parser.parse_args(argv)
    try:
        with on_terminal():
            _export(args)
    except QatError as error:
        print(f"qat-export: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # of the terminal, not of a file
        raise
    except OSError as error:
        print(f"qat-export: {os_error_message(error)}; no new file was kept", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("qat-export: interrupted; no new file was kept", file=sys.stderr)
        return 130
    return 0


def _export(args: argparse.Namespace) -> None:
    from qat_runner.config import CONFIG_FILE, read_config
    from qat_runner.exporting import export_summary, run_export
    from qat_runner.runs.folder import RunFolder

    if args.batches < 1:
        raise ConfigError(f"--batches {args.batches}: must be 1 or more")
    if args.compare and (args.out or args.no_fold or set(args.formats) != {*FORMATS}):
        raise ConfigError("--compare: cannot be combined with --out, --no-fold or --formats, since it writes nothing")
    if args.compare:
        rules = [args.scalars] if args.scalars else None
        figures = run_export.compare_rules(args.run_dir, rules, args.batches, args.checkpoint)
        print(export_summary.text_of_rules(figures, read_config(args.run_dir / CONFIG_FILE).task.measure))
        return
    out = args.out or RunFolder(args.run_dir).export
    request = run_export.Request(
        args.run_dir, out, args.scalars, args.batches, args.checkpoint, not args.no_fold, tuple(args.formats)
    )
    print(f"\n{export_summary.text(run_export.export(request))}\n\n{out}")
