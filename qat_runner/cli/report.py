"""qat-report: pages of runs, and the paper's tables and figures from a folder of runs.

    qat-report runs/NAME                       a page that shows the run, in runs/NAME/report.html
    qat-report compare runs                    a page that sets runs, or folders of runs, side by side
    qat-report status runs                     which runs are finished, running, stale, failed or missing
    qat-report methods runs                    means over seeds, and the differences of methods, seed by seed
    qat-report results runs                    their summaries in one CSV file, with their configs, to be kept
    qat-report ledger runs results.csv         every claim and every cell of the paper, and whether it holds here
    qat-report table1 runs                     ours beside the published numbers
    qat-report table3 runs --dataset cifar10   where runs of several data sets lie there
    qat-report table6 --run runs/NAME          seconds to find the scalars of a run's tensors; alone: BERT-Base's
    qat-report figure1 --run runs/NAME         MSE curves of a trained network's tensors
    qat-report figure2 --run runs/NAME         scalars and MSE of all its tensors, by the MSE sweep and by OCTAV
    qat-report figure2 --model resnet50 --weights torchvision --dataset imagenet
                                               the same of its weights; with --data-dir DIR of its activations as well
    qat-report figure3                         the gradient estimators
    qat-report figure4 runs                    accuracy against epoch of Table 1's runs
    qat-report figure5 --run runs/NAME         static scalars by OCTAV and by the MSE sweep, and where they part
    qat-report iterations                      OCTAV's iteration from several starts
    qat-report ranges                          where the last codes lie, and what that is worth to short rows

Pages are single files that need no network. Tables are printed, and written as Markdown, CSV, LaTeX and HTML; figures
are written as PNG and SVG. Exit codes: 0 all is well, 2 the request cannot be carried out.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import qat_runner
from qat_runner.cli.terminal import on_terminal
from qat_runner.errors import ConfigError, QatError, file_told
from qat_runner.runs.files import write_text
from qat_runner.wording import meant

LAYOUTS = {"markdown": ".md", "csv": ".csv", "latex": ".tex", "html": ".html"}
SEVERAL = ("compare", "methods", "results", "ledger")
"""What takes several folders."""

WITHOUT_RUNS = ("table6", "figure1", "figure2", "figure3", "figure5", "iterations", "ranges")
"""What takes none; some are about one run, which a flag names."""

OF_FOLDERS = ("compare", "figure4", "status")
"""What takes no table of results: its lines have no curves, and no state."""

FIGURES = ("figure1", "figure2", "figure3", "figure4", "figure5", "iterations", "ranges")


def verbs() -> tuple[str, ...]:
    """What can be asked for, beside the page of a run."""
    from qat_runner.paper.tables import TABLES

    return ("compare", "methods", "results", "ledger", *TABLES, "table6", *FIGURES, "status")


def used_by() -> dict[str, tuple[str, ...]]:
    """Flags, and what they are for."""
    from qat_runner.paper.tables import TABLES

    of_runs = (*SEVERAL, *TABLES, "figure2", "figure4")
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
    parser.add_argument("what", metavar="WHAT", help=f"the folder of a run, or one of {', '.join(verbs())}")
    parser.add_argument(
        "places",
        nargs="*",
        type=Path,
        help="folder of run folders (runs); compare, methods: runs as well; methods, results, ledger and tables: "
        "tables of results (CSV) as well",
    )
    parser.add_argument("--dataset", help="whose runs, where there are several; figure2: what --weights are for")
    parser.add_argument("--model", help="runs of one network alone; figure2: the network of --weights")
    parser.add_argument(
        "--run",
        type=Path,
        help="figures 1, 2 and 5, iterations, table6: the run whose tensors it is about",
    )
    parser.add_argument("--weights", metavar="FILE", help="figure2: of a network's weights, as qat-run takes them")
    parser.add_argument("--data-dir", type=Path, help="figure2: of its activations as well, on the data that lie there")
    parser.add_argument("--against", metavar="METHOD", help="methods: what others are compared with (octav)")
    parser.add_argument("--out", type=Path, help="folder to write to (report; for a run, its own)")
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
        raise  # of the terminal, not of what is written
    except OSError as error:
        print(f"qat-report: {file_told(error)}", file=sys.stderr)
        return 2
    return 0


def _settle(args: argparse.Namespace) -> None:
    """Make out what is meant: `run_page`, and `runs_dir` of what takes a folder of runs."""
    from qat_runner.config import CONFIG_FILE

    args.run_page = args.what not in verbs()
    if args.run_page and not Path(args.what).is_dir():
        raise ConfigError(
            f"{args.what}: is neither the folder of a run nor one of {', '.join(verbs())}{meant(args.what, verbs())}"
        )
    if (
        args.run_page
        and any(Path(args.what).glob(f"*/{CONFIG_FILE}"))
        and not (Path(args.what) / CONFIG_FILE).is_file()
    ):
        raise ConfigError(f"{args.what}: holds no run of its own; qat-report compare {args.what} shows those in it")
    if len(args.places) > (0 if args.run_page or args.what in WITHOUT_RUNS else 1) and args.what not in SEVERAL:
        raise ConfigError(f"{args.places[-1]}: is one folder too many; qat-report compare takes several")
    if args.what in OF_FOLDERS and len(args.places) == 1 and args.places[0].is_file():
        raise ConfigError(f"{args.places[0]}: is a file, and {args.what} takes folders of runs alone")
    if args.what == "status" and args.out is not None:
        raise ConfigError("--out: status writes nothing")
    for key, those in used_by().items():
        said = f"--{key.replace('_', '-')}"
        if getattr(args, key) is not None and args.what not in those:
            raise ConfigError(f"{said}: is for {', '.join(those)}")
        if args.what == "figure2" and args.run is not None and key != "run" and getattr(args, key) is not None:
            raise ConfigError(f"{said}: figure2 has it from --run")
    args.runs_dir = args.places[0] if args.places else Path("runs")
    args.out = args.out or (Path(args.what) if args.run_page else Path("report"))


def _report(args: argparse.Namespace) -> list[Path]:
    """Print and write what was asked for; returns the files."""
    if args.run_page:
        from qat_runner.report import run_page
        from qat_runner.runs.folder import RunFolder

        return [run_page.write(Path(args.what), RunFolder(args.out).page)]
    if args.what == "compare":
        from qat_runner.report import compare_page

        places = args.places or [args.runs_dir]
        return [compare_page.write(places, args.out / "compare.html", args.dataset, args.model)]
    if args.what == "status":
        from qat_runner.runs import status

        print(status.text(status.statuses(args.runs_dir)))
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

    runs = runs_at([args.runs_dir])
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
        raise ConfigError(f"{asked}{args.runs_dir} holds runs of {', '.join(present)}: --dataset chooses one")
    return str(wanted)


def _table6(run: Path | None, out: Path) -> list[Path]:
    from qat_runner.paper import table6

    table = (table6.synthetic() if run is None else table6.of_run(run)).table()
    print(table.text("markdown"))
    return _write(out, "table6", {layout: table.text(layout) for layout in LAYOUTS})


def _methods(args: argparse.Namespace) -> list[Path]:
    from qat_runner.paper import figures
    from qat_runner.report import methods
    from qat_runner.report.entries import entries
    from qat_runner.report.runs import not_finished

    places = args.places or [args.runs_dir]
    runs, left_out = entries(places, args.dataset, args.model)
    for why in left_out:
        logging.getLogger("qat_runner").warning(f"{why}: left out")
    found = methods.standings(runs, args.against)
    if not found:
        raise ConfigError(f"{places[0]}: holds no finished run")
    table = methods.table(found, not_finished(run.folder for run in runs if run.summary is None))
    print(table.text("markdown"))
    texts = {layout: table.text(layout) for layout in LAYOUTS} | {"csv": methods.numbers(found).text("csv")}
    return [*_write(args.out, "methods", texts), *figures.save(figures.methods(found), args.out / "methods")]


def _results(args: argparse.Namespace) -> list[Path]:
    from qat_runner.report.results import runs_at, write_results
    from qat_runner.report.runs import selected

    places = args.places or [args.runs_dir]
    runs = runs_at(places)
    if all(run.summary is None for run in runs):
        raise ConfigError(f"{places[0]}: holds no finished run of qat-run")
    return write_results(selected(runs, args.dataset, args.model), args.out)[:1]


def _ledger(args: argparse.Namespace) -> list[Path]:
    from qat_runner.paper.ledger import ledger
    from qat_runner.report.results import runs_at
    from qat_runner.report.runs import selected

    document, lines = ledger(selected(runs_at(args.places or [args.runs_dir]), args.dataset, args.model))
    print(document.lead[-1])
    texts = {layout: document.text(layout) for layout in ("markdown", "html")}
    return _write(args.out, "ledger", texts | {"csv": lines.text("csv")})


def _figure(args: argparse.Namespace) -> list[Path]:
    from qat_runner.paper import figure2, figure5, figures, grids
    from qat_runner.report.results import runs_at

    tables: dict[str, str] = {}
    if args.what == "figure2":
        compared = figure2.of_run(args.run) if args.run else figure2.of_weights(*_weights(args))
        figure, tables = figure2.draw(compared), {"csv": figure2.table(compared)}
    elif args.what == "ranges":
        figure = grids.ranges()
    elif args.what == "figure3":
        figure = figures.figure3()
    elif args.what == "figure4":
        runs = runs_at([args.runs_dir])
        figure = figures.figure4(runs, _dataset(args, [run.dataset for run in runs]), args.model)
    elif args.what == "figure5":
        if args.run is None:
            raise ConfigError("figure5: needs --run RUN_DIR, the run whose activations are shown")
        inputs, views = figure5.inputs_of_run(args.run)
        figure, tables = figure5.draw(inputs, views), {"csv": figure5.table(inputs)}
    else:
        samples = figures.synthetic_samples() if args.run is None else figures.samples_of_run(args.run)
        figure = (figures.figure1 if args.what == "figure1" else figures.iterations)(samples)
    args.out.mkdir(parents=True, exist_ok=True)
    return [*_write(args.out, args.what, tables), *figures.save(figure, args.out / args.what)]


def _weights(args: argparse.Namespace) -> tuple[str, str, str, Path | None]:
    """The network, its weights and their data, as they are named for figure 2."""
    if None in (args.model, args.weights, args.dataset):
        raise ConfigError("figure2: needs --run RUN_DIR, or --model NAME --weights FILE --dataset NAME")
    return args.model, args.weights, args.dataset, args.data_dir
