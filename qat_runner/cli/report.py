"""qat-report: HTML reports of runs, and the paper's tables and figures from a folder of runs.

    qat-report runs/NAME                       HTML report of a run, in runs/NAME/report.html
    qat-report compare runs                    HTML report that compares runs, or folders of runs, side by side
    qat-report status runs                     which runs are finished, running, stale, failed or missing
    qat-report methods runs                    means over seeds, and differences between methods, seed by seed
    qat-report results runs                    summaries and configs of the runs in one CSV file, to be kept
    qat-report ledger runs results.csv         every claim and every table cell of the paper, and whether it holds here
    qat-report table1 runs                     results next to the published numbers
    qat-report table3 runs --dataset cifar10   the same if the folder has runs of several data sets
    qat-report table6 --run runs/NAME          seconds to find the scalars of a run's tensors (without --run: BERT-Base)
    qat-report figure1 --run runs/NAME         MSE curves of a trained network's tensors
    qat-report figure2 --run runs/NAME         scalars and MSE of all its tensors, by the MSE sweep and by OCTAV
    qat-report figure2 --model resnet50 --weights torchvision --dataset imagenet
                                               the same for other weights; with --data-dir DIR also for activations
    qat-report figure3                         the gradient estimators
    qat-report figure4 runs                    accuracy by epoch of the runs of Table 1
    qat-report figure5 --run runs/NAME         static scalars by OCTAV and by the MSE sweep, and where they differ
    qat-report iterations                      OCTAV's iterations from several initial values
    qat-report ranges                          the outermost codes of each range, and their effect on short rows

HTML reports are single files that need no network access. Tables are printed, and written as Markdown, CSV, LaTeX and
HTML; figures are written as PNG and SVG. Exit codes: 0 success, 2 the command cannot be carried out.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import qat_runner
from qat_runner.cli.terminal import on_terminal
from qat_runner.errors import ConfigError, QatError, os_error_message
from qat_runner.runs.files import write_text
from qat_runner.wording import meant

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYOUTS = {"markdown": ".md", "csv": ".csv", "latex": ".tex", "html": ".html"}
COMPARING = ("compare", "methods", "results", "ledger")
"""Subcommands about all runs of the folders."""

WITHOUT_RUNS = ("table6", "figure1", "figure2", "figure3", "figure5", "iterations", "ranges")
"""Subcommands that take no folder; some are about one run, which a flag selects."""

OF_FOLDERS = ("compare", "figure4", "status")
"""Subcommands that take no table of results, because its rows have neither curves nor a state."""

FIGURES = ("figure1", "figure2", "figure3", "figure4", "figure5", "iterations", "ranges")


def verbs() -> tuple[str, ...]:
    """Return the subcommands, apart from the HTML report of a run."""
    from qat_runner.paper.tables import TABLES

    return (*COMPARING, *TABLES, "table6", *FIGURES, "status")


def used_by() -> dict[str, tuple[str, ...]]:
    """Return the flags and the subcommands that each applies to."""
    from qat_runner.paper.tables import TABLES

    of_runs = (*COMPARING, *TABLES, "figure2", "figure4")
    return {
        "dataset": of_runs,
        "model": of_runs,
        "run": ("table6", "figure1", "figure2", "figure5", "iterations"),
        "weights": ("figure2",),
        "data_dir": ("figure2",),
        "against": ("methods",),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        "qat-report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {qat_runner.__version__}")
    parser.add_argument("what", metavar="WHAT", help=f"folder of a run, or one of {', '.join(verbs())}")
    parser.add_argument(
        "places",
        nargs="*",
        type=Path,
        help="folders of run folders (default: runs; status: only one); compare, methods: also single runs; methods, "
        "results, ledger and tables: also tables of results (CSV)",
    )
    parser.add_argument("--dataset", help="only runs of this data set; figure2: the data set of --weights")
    parser.add_argument("--model", help="only runs of this network; figure2: the network of --weights")
    parser.add_argument(
        "--run",
        type=Path,
        help="figures 1, 2 and 5, iterations, table6: the run whose tensors are shown",
    )
    parser.add_argument("--weights", metavar="FILE", help="figure2: weights of a network, as in qat-run")
    parser.add_argument("--data-dir", type=Path, help="figure2: also show activations, on the data in this folder")
    parser.add_argument(
        "--against", metavar="METHOD", help="methods: the method that others are compared with (default: octav)"
    )
    parser.add_argument("--out", type=Path, help="output folder (default: report; for a run, its own folder)")
    args = parser.parse_args(argv)
    try:
        _settle(args)
        with on_terminal(logging.WARNING, "stderr"):
            paths = _report(args)
        for path in paths:
            print(path)
    except QatError as error:
        print(f"qat-report: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        raise  # from the terminal, not from a file that is written
    except OSError as error:
        print(f"qat-report: {os_error_message(error)}", file=sys.stderr)
        return 2
    return 0


def _settle(args: argparse.Namespace) -> None:
    """Check the arguments, and set `run_page`, and `places` and `out` if they were not given."""
    from qat_runner.config import CONFIG_FILE

    args.run_page = args.what not in verbs()
    if args.run_page and not Path(args.what).is_dir():
        raise ConfigError(
            f"{args.what}: must be the folder of a run or one of {', '.join(verbs())}{meant(args.what, verbs())}"
        )
    if (
        args.run_page
        and any(Path(args.what).glob(f"*/{CONFIG_FILE}"))
        and not (Path(args.what) / CONFIG_FILE).is_file()
    ):
        raise ConfigError(f"{args.what}: is not a run; qat-report compare {args.what} shows the runs in it")
    if (why := _one_too_many(args)) is not None:
        raise ConfigError(f"{args.places[-1]}: is one folder too many; {why}")
    files = [place for place in args.places if place.is_file()] if args.what in OF_FOLDERS else []
    if files and (len(args.places) == 1 or args.what != "compare"):  # compare names the other places that are no runs
        raise ConfigError(f"{files[0]}: is a file, but {args.what} takes only folders of runs")
    if args.what == "status" and args.out is not None:
        raise ConfigError("--out: status writes nothing")
    for key, those in used_by().items():
        said = f"--{key.replace('_', '-')}"
        if getattr(args, key) is not None and args.what not in those:
            raise ConfigError(f"{said}: applies only to {', '.join(those)}")
        if args.what == "figure2" and args.run is not None and key != "run" and getattr(args, key) is not None:
            raise ConfigError(f"{said}: cannot be combined with --run, which determines it for figure2")
    args.places = args.places or [Path("runs")]
    args.out = args.out or (Path(args.what) if args.run_page else Path("report"))


def _one_too_many(args: argparse.Namespace) -> str | None:
    """Return which folders a subcommand takes, if it was given too many."""
    if args.run_page:
        return "qat-report compare shows several runs" if args.places else None
    if args.what == "status":
        return "status takes only one" if len(args.places) > 1 else None
    if args.what not in WITHOUT_RUNS or not args.places:
        return None
    return f"{args.what} takes none" + ("; select a run with --run" if args.what in used_by()["run"] else "")


def _report(args: argparse.Namespace) -> list[Path]:
    """Run the subcommand; returns the files that it wrote."""
    if args.run_page:
        from qat_runner.report import run_page
        from qat_runner.runs.folder import RunFolder

        return [run_page.write(Path(args.what), RunFolder(args.out).page)]
    if args.what == "compare":
        from qat_runner.report import compare_page

        return [compare_page.write(args.places, args.out / "compare.html", args.dataset, args.model)]
    if args.what == "status":
        from qat_runner.runs import status

        print(status.text(status.statuses(args.places[0])))
        return []
    if args.what == "methods":
        return _methods(args)
    if args.what == "results":
        return _results(args)
    if args.what == "ledger":
        return _ledger(args)
    if args.what == "table6":
        return _table6(args.run, args.out)
    if args.what in FIGURES:
        return _figure(args)
    from qat_runner.paper.tables import make_table
    from qat_runner.report.results import runs_at

    runs = runs_at(args.places)
    table = make_table(args.what, runs, _dataset(args, [run.dataset for run in runs]), args.model)
    print(table.text("markdown"))
    return _write(args.out, args.what, {layout: table.text(layout) for layout in LAYOUTS})


def _write(out: Path, name: str, texts: dict[str, str]) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for layout, text in texts.items():
        paths.append(out / f"{name}{LAYOUTS[layout]}")
        write_text(paths[-1], text)
    return paths


def _dataset(args: argparse.Namespace, present: list[str]) -> str:
    present = sorted({*present})
    wanted = args.dataset or (present[0] if len(present) == 1 else None)
    if wanted not in present:
        asked = "" if args.dataset is None else f"--dataset {args.dataset}: "
        what = f"runs of {', '.join(present)} in {_named(args.places)}"
        raise ConfigError(f"{asked}there are {what}; select one with --dataset")
    return str(wanted)


def _named(places: Sequence[Path]) -> str:
    return ", ".join(map(str, places))


def _table6(run: Path | None, out: Path) -> list[Path]:
    from qat_runner.paper import table6

    table = (table6.synthetic() if run is None else table6.of_run(run)).table()
    print(table.text("markdown"))
    return _write(out, "table6", {layout: table.text(layout) for layout in LAYOUTS})


def _methods(args: argparse.Namespace) -> list[Path]:
    from qat_runner.paper import figures
    from qat_runner.report import methods
    from qat_runner.report.entries import entries, rules_in_words, unplaced
    from qat_runner.report.runs import not_finished

    runs, left_out = entries(args.places, args.dataset, args.model)
    left_out += unplaced(runs)
    for why in left_out:
        logging.getLogger("qat_runner").warning(f"{why}: left out")
    found = methods.standings(runs, args.against)
    if not found:
        raise ConfigError(f"{_named(args.places)}: holds no finished run")
    unfinished = not_finished(run.folder for run in runs if run.summary is None)
    absent = [f"Left out: {'; '.join(left_out)}."] if left_out else []
    table = methods.table(found, [*rules_in_words(runs), *unfinished, *absent])
    print(table.text("markdown"))
    texts = {layout: table.text(layout) for layout in LAYOUTS} | {"csv": methods.numbers(found).text("csv")}
    return [*_write(args.out, "methods", texts), *figures.save(figures.methods(found), args.out / "methods")]


def _results(args: argparse.Namespace) -> list[Path]:
    from qat_runner.report.results import runs_at, write_results
    from qat_runner.report.runs import selected

    runs = runs_at(args.places)
    if all(run.summary is None for run in runs):
        raise ConfigError(f"{_named(args.places)}: holds no finished run of qat-run")
    return write_results(selected(runs, args.dataset, args.model), args.out)[:1]


def _ledger(args: argparse.Namespace) -> list[Path]:
    from qat_runner.paper.ledger import ledger
    from qat_runner.report.results import runs_and_errors_at
    from qat_runner.report.runs import selected

    runs, errors = runs_and_errors_at(args.places)
    document, lines = ledger(selected(runs, args.dataset, args.model), errors)
    print(document.lead[-1])
    texts = {layout: document.text(layout) for layout in ("markdown", "html")}
    return _write(args.out, "ledger", texts | {"csv": lines.text("csv")})


def _figure(args: argparse.Namespace) -> list[Path]:
    from qat_runner.paper import figures
    from qat_runner.report.results import runs_at

    tables: dict[str, str] = {}
    if args.what == "figure4":
        runs = runs_at(args.places)
        figure = figures.figure4(runs, _dataset(args, [run.dataset for run in runs]), args.model)
    else:
        figure, tables = _figure_of_tensors(args)
    args.out.mkdir(parents=True, exist_ok=True)
    return [*_write(args.out, args.what, tables), *figures.save(figure, args.out / args.what)]


def _figure_of_tensors(args: argparse.Namespace) -> "tuple[Figure, dict[str, str]]":
    """Draw a figure that needs PyTorch, and the tables beside it by format."""
    from qat_runner.paper import figure2, figure5, grids, tensor_figures

    if args.what == "figure2":
        compared = figure2.of_run(args.run) if args.run else figure2.of_weights(*_weights(args))
        return figure2.draw(compared), {"csv": figure2.table(compared)}
    if args.what == "figure5":
        if args.run is None:
            raise ConfigError("figure5: needs --run RUN_DIR, the run whose activations are shown")
        inputs, views = figure5.inputs_of_run(args.run)
        return figure5.draw(inputs, views), {"csv": figure5.table(inputs)}
    if args.what in ("ranges", "figure3"):
        return grids.ranges() if args.what == "ranges" else tensor_figures.figure3(), {}
    samples = tensor_figures.synthetic_samples() if args.run is None else tensor_figures.samples_of_run(args.run)
    return (tensor_figures.figure1 if args.what == "figure1" else tensor_figures.iterations)(samples), {}


def _weights(args: argparse.Namespace) -> tuple[str, str, str, Path | None]:
    """Return the network, its weights, its data set and its data folder, as given for figure 2."""
    if None in (args.model, args.weights, args.dataset):
        raise ConfigError("figure2: needs --run RUN_DIR, or --model NAME --weights FILE --dataset NAME")
    return args.model, args.weights, args.dataset, args.data_dir
