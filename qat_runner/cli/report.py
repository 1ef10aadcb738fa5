"""qat-report: pages of runs, and the paper's tables and figures from a folder of runs.

    qat-report runs/NAME                       a page that shows the run, in runs/NAME/report.html
    qat-report compare runs                    a page that sets runs, or folders of runs, side by side
    qat-report table1 runs                     ours beside the published numbers
    qat-report table3 runs --dataset cifar10   where runs of several data sets lie there
    qat-report figure1 --run runs/NAME         MSE curves of a trained network's tensors
    qat-report status runs                     which runs are finished, running, stale, failed or missing
    qat-report figure3                         the gradient estimators
    qat-report figure5 --run runs/NAME         static scalars by OCTAV and by the MSE sweep, and where they part
    qat-report table6 --run runs/NAME          seconds to find them

Pages are single files that need no network. Tables are printed, and written as Markdown, CSV, LaTeX and HTML; figures
are written as PNG and SVG. Exit codes: 0 all is well, 2 the request cannot be carried out.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qat_runner.errors import ConfigError, QatError

LAYOUTS = {"markdown": ".md", "csv": ".csv", "latex": ".tex", "html": ".html"}
FIGURES = ("figure1", "figure2", "figure3", "figure4", "figure5")


def verbs() -> tuple[str, ...]:
    """What can be asked for, beside the page of a run."""
    from qat_runner.report.tables_of_paper import TABLES

    return ("compare", *TABLES, "table6", *FIGURES, "status")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        "qat-report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", metavar="WHAT", help=f"the folder of a run, or one of {', '.join(verbs())}")
    parser.add_argument("places", nargs="*", type=Path, help="folder of run folders (runs); compare: runs as well")
    parser.add_argument("--dataset", help="whose runs, where there are several")
    parser.add_argument("--model", help="tables: of one network alone")
    parser.add_argument(
        "--run",
        type=Path,
        help="figures 1, 2 and 5, table6: the run whose tensors it is about",
    )
    parser.add_argument("--out", type=Path, help="folder to write to (report; for a run, its own)")
    args = parser.parse_args(argv)
    try:
        _settle(args)
        for path in _report(args):
            print(path)
    except QatError as error:
        print(f"qat-report: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"qat-report: {args.out} cannot be written ({error})", file=sys.stderr)
        return 2
    return 0


def _settle(args: argparse.Namespace) -> None:
    """Make out what is meant: `run_page`, and `runs_dir` of what takes a folder of runs."""
    args.run_page = args.what not in verbs()
    if args.run_page and not Path(args.what).is_dir():
        raise ConfigError(f"{args.what}: is neither the folder of a run nor one of {', '.join(verbs())}")
    if args.run_page and any(Path(args.what).glob("*/config.yaml")) and not (Path(args.what) / "config.yaml").is_file():
        raise ConfigError(f"{args.what}: holds no run of its own; qat-report compare {args.what} shows those in it")
    if (len(args.places) > 1 and args.what != "compare") or (args.run_page and args.places):
        raise ConfigError(f"{args.places[-1]}: is one folder too many; qat-report compare takes several")
    args.runs_dir = args.places[0] if args.places else Path("runs")
    args.out = args.out or (Path(args.what) if args.run_page else Path("report"))


def _report(args: argparse.Namespace) -> list[Path]:
    """Print and write what was asked for; returns the files."""
    if args.run_page:
        from qat_runner.report import run_page

        return [run_page.write(Path(args.what), args.out / "report.html")]
    if args.what == "compare":
        from qat_runner.report import compare_page

        return [compare_page.write(args.places or [args.runs_dir], args.out / "compare.html")]
    if args.what == "status":
        from qat_runner.report import status

        print(status.text(status.statuses(_folder(args.runs_dir))))
        return []
    if args.what == "table6":
        return _table6(args.run, args.out)
    if args.what in FIGURES:
        return _figure(args)
    from qat_runner.report.runs import find_runs
    from qat_runner.report.tables_of_paper import make_table

    runs = find_runs(_folder(args.runs_dir))
    table = make_table(args.what, runs, _dataset(args, [run.dataset for run in runs]), args.model)
    print(table.text("markdown"))
    return _write(args.out, args.what, {layout: table.text(layout) for layout in LAYOUTS})


def _write(out: Path, name: str, texts: dict[str, str]) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for layout, text in texts.items():
        paths.append(out / f"{name}{LAYOUTS[layout]}")
        paths[-1].write_text(text)
    return paths


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder of runs")
    return path


def _dataset(args: argparse.Namespace, present: list[str]) -> str:
    present = sorted({*present})
    if args.dataset is not None:
        if args.dataset not in present:
            raise ConfigError(f"--dataset {args.dataset}: {args.runs_dir} holds runs of {', '.join(present) or 'none'}")
        return str(args.dataset)
    if len(present) != 1:
        what = f"runs of {', '.join(present)}: --dataset chooses one" if present else "no runs"
        raise ConfigError(f"{args.runs_dir}: holds {what}")
    return present[0]


def _table6(run: Path | None, out: Path) -> list[Path]:
    from qat_runner.report import table6

    text = (table6.synthetic() if run is None else table6.of_run(run)).text()
    print(text)
    return _write(out, "table6", {"markdown": text})


def _figure(args: argparse.Namespace) -> list[Path]:
    from qat_runner.report import figure5
    from qat_runner.report import figures_of_paper as figures
    from qat_runner.report.runs import find_runs

    tables: list[Path] = []
    if args.what == "figure3":
        figure = figures.figure3()
    elif args.what == "figure4":
        runs = find_runs(_folder(args.runs_dir))
        figure = figures.figure4(runs, _dataset(args, [run.dataset for run in runs]))
    elif args.what == "figure5":
        if args.run is None:
            raise ConfigError("figure5: needs --run RUN_DIR, the run whose activations are shown")
        scalars = figure5.static_scalars(args.run)
        figure = figure5.draw(scalars)
        tables = _write(args.out, "figure5", {"csv": figure5.table(scalars)})
    else:
        samples = figures.synthetic_samples() if args.run is None else figures.samples_of_run(args.run)
        figure = (figures.figure1 if args.what == "figure1" else figures.figure2)(samples)
    args.out.mkdir(parents=True, exist_ok=True)
    return [*tables, *figures.save(figure, args.out / args.what)]
