"""Tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate


def _number(value: object, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def results_table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """A row a run, from summary.json, each beside the full-precision run of the same model, data, mode and seed.

    Where there is none, beside the full-precision network as it is, which retraining starts from.
    """
    baselines = {_setting(s): s["top1"] for s in summaries if s["clipping"] == "none"}
    starts = {_setting(s)[:2]: s["top1"] for s in summaries if s["clipping"] == "none" and s["mode"] == "evaluate"}
    rows = []
    for s in summaries:
        baseline = baselines.get(_setting(s), starts.get(_setting(s)[:2]))
        drop = "" if baseline is None or s["clipping"] == "none" else f"{s['top1'] - baseline:+.2f}"
        rows.append(
            (
                s["model"],
                s["dataset"],
                s["mode"],
                s["bits"],
                s["clipping"] + (", distilled" if s.get("distilled") else ""),
                s["gradient"],
                s["seed"],
                _number(s["top1"], 2),
                drop,
                _number(s["best_top1"], 2),
                _number(s["sqnr_db"], 1),
                _number(s["images_per_second"], 0),
                _number(s["seconds"], 1),
            )
        )
    headers = [
        "model",
        "dataset",
        "mode",
        "bits",
        "clipping",
        "gradient",
        "seed",
        "top1 %",
        "vs fp32",
        "best %",
        "SQNR dB",
        "img/s",
        "s",
    ]
    return tabulate(
        rows, headers, disable_numparse=True, colalign=["left"] * 3 + ["right"] + ["left"] * 2 + ["right"] * 7
    )


def _setting(summary: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(summary[key] for key in ("model", "dataset", "mode", "seed"))
