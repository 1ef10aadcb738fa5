"""Edited, truncated or invented records: each affects only its own run, and one sentence says what is wrong where."""

import copy
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qat_runner.cli.export import main as export
from qat_runner.cli.report import main as report
from qat_runner.config import Config, identities, read_config
from qat_runner.errors import UnreadableError
from qat_runner.exporting import export_summary
from qat_runner.insertion import LayerNoise
from qat_runner.report import page, run_page
from qat_runner.report import runs as runs_in_report
from qat_runner.runs import records
from qat_runner.runs.checkpoints import Progress
from qat_runner.training.loop import State
from tests.report.test_pages import ALLOCATED, make_run, text_of

EXPORTED: dict[str, Any] = {
    "run": "runs/bad",
    "model": "resnet20",
    "dataset": "fake",
    "weight_bits": 4,
    "activation_bits": 4,
    "clipping": "octav",
    "scalars": "averaged",
    "batches": 10,
    "batchnorm": "folded",
    "batchnorm_kept": [],
    "metric": "top1",
    "processor": "a CPU",
    "figures": {
        "static": {"accuracy": 60.0},
        "onnx_fused": {"accuracy": 50.0, "agreement": 70.0, "largest_difference": 1.0},
    },
    "bytes": {"full_precision": 100, "onnx": 20},
    "milliseconds": {"full_precision": 1.0, "onnx": 2.0},
}
OTHERS = {
    "error.txt": "the loss became nan\n\nwhere it was raised ...\n",
    "lock": '{"process": 1, "host": "elsewhere"}',
}
SHOWN = "2 finished"
"""What `status` says about the runs other than the hostile one."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, and the run `bad`, which tests corrupt."""
    runs = tmp_path_factory.mktemp("sound") / "runs"
    make_run(runs, "bits=32", name="full", top1=70.0)
    make_run(runs, "seed=1", name="other", top1=61.0)
    bad = make_run(runs, name="bad")
    (bad / "export").mkdir()
    (bad / "export" / "export.json").write_text(json.dumps(EXPORTED))
    (bad / "allocation.json").write_text(json.dumps(ALLOCATED))
    (bad / "oscillations.csv").write_text(f"{OSCILLATION}1,fc,640,2.5,0\n2,fc,640,1.5,0.5\n")
    (runs / "asked.txt").write_text("bad\nfull\nother\n")
    return runs


@pytest.fixture
def runs(sound: Path, tmp_path: Path) -> Path:
    """A copy of these runs that a test may corrupt."""
    return Path(shutil.copytree(sound, tmp_path / "runs"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache configs: composing and reading them again for each page would take seconds."""
    monkeypatch.setattr(identities, "read_config", _once_read)
    monkeypatch.setattr(runs_in_report, "read_config", _once_read)
    monkeypatch.setattr(page, "plotly", str)
    for name in ("command", "sections", "choices"):
        monkeypatch.setattr(run_page, name, _once(getattr(run_page, name)))


@functools.cache
def _once(function: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[str, Any] = {}

    def cached(config: Any) -> Any:
        key = repr(config)
        if key not in known:
            known[key] = function(config)
        return known[key]

    return cached


@functools.cache
def _config_of(content: bytes) -> Config:
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(content)
        file.flush()
        return read_config(Path(file.name))


def _once_read(path: Path) -> Config:
    try:
        return _config_of(path.read_bytes())
    except UnreadableError:
        return read_config(path)


def path_of(runs: Path, name: str) -> Path:
    return runs / name if name == "asked.txt" else runs / "bad" / ("export" if name == "export.json" else ".") / name


def spoil(runs: Path, name: str, content: str | bytes) -> None:
    path = path_of(runs, name)
    if name in OTHERS:  # these are only read for an unfinished run
        (runs / "bad" / "summary.json").unlink(missing_ok=True)
        (runs / "bad" / "error.txt").write_text(OTHERS["error.txt"])
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def ask(verb: list[str], runs: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run a verb; return its exit code, stdout and stderr."""
    capsys.readouterr()
    words = [str(runs / "bad") if word == "RUN" else str(runs) if word == "RUNS" else word for word in verb]
    code = report([*words, *(() if verb[0] == "status" else ("--out", str(out)))])
    message = capsys.readouterr()
    return code, message.out, message.err


VERBS = (["RUN"], ["compare", "RUNS"], ["status", "RUNS"], ["table1", "RUNS"])


def check_all(runs: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Check that all verbs succeed and show the other runs; return all of their output."""
    everything = ""
    for verb in VERBS:
        code, printed, err = ask(verb, runs, out, capsys)
        assert code == 0, (verb, err)
        assert "Traceback" not in printed + err
        sentences = err.splitlines()
        assert len(sentences) == len({*sentences}) and all(": " in sentence for sentence in sentences), err
        everything += " ".join((printed + err).split())
        if verb[0] == "RUN":
            everything += text_of(out / "report.html")
        if verb[0] == "status":
            assert SHOWN in " ".join(printed.split()) or "3 finished" in printed
        if verb[0] == "compare":
            page = text_of(out / "compare.html")
            assert "61.00" in page and "70.00" in page
            everything += page
    return everything


def changed(content: dict[str, Any], *keys: str, to: Any = ...) -> str:
    """Return JSON of a content with the value at `keys` replaced; without `to`, removed."""
    content = copy.deepcopy(content)
    place = content
    for key in keys[:-1]:
        place = place[key]
    if to is ...:
        del place[keys[-1]]
    else:
        place[keys[-1]] = to
    return json.dumps(content)


SUMMARY: dict[str, Any] = {
    "model": "resnet20",
    "dataset": "fake",
    "mode": "scratch",
    "seed": 0,
    "clipping": "octav",
    "gradient": "mph",
    "metric": "top1",
    "top1": 60.0,
    "best_top1": 61.0,
    "epochs": 2,
    "seconds": 90.0,
    "sqnr_db": 20.0,
    "size_mb": 0.5,
    "fp32_size_mb": 4.0,
}
ENVIRONMENT: dict[str, Any] = {
    "command": ["qat-run"],
    "started": "2026",
    "python": "3.12",
    "packages": {"torch": "2.11"},
    "git": None,
    "machine": {"platform": "x", "processor": "y", "cores": 2, "torch_threads": 2, "gpus": [], "cuda": None},
}
HISTOGRAM: dict[str, Any] = {
    "layer": "fc",
    "tensor": "weight",
    "bits": 4,
    "signed": True,
    "granularity": "channel",
    "s": 1.0,
    "low": -1.0,
    "high": 1.0,
    "lowest": -1.0,
    "highest": 1.0,
    "beyond": 0,
    "counts": [1, 2],
    "levels": [0.0],
}
OSCILLATION = "epoch,layer,elements,oscillating,frozen\n"
LAYER = "epoch,layer,tensor,bits,signed,granularity,s,mse,sqnr_db,clipped_fraction,max_sqnr_db\n"

UNFIT: list[tuple[str, str | bytes, str]] = [
    ("summary.json", "[]", "valid dictionary"),
    ("summary.json", "{}", "model: field required"),
    ("summary.json", "", "Expecting value"),
    ("summary.json", "null", "valid dictionary"),
    ("summary.json", '{"top1": 60', "Expecting"),
    ("summary.json", b"\xff\xfe{}", "not UTF-8"),
    ("summary.json", b"\x00" * 100, "cannot be read"),
    ("summary.json", "[" * 100_000, "nested too deeply"),
    ("summary.json", '{"a": ' * 100_000, "nested too deeply"),
    ("summary.json", '{"top1": 1, "top1": 2}', "top1: appears twice"),
    ("summary.json", '{"top1": NaN}', "NaN is not valid JSON"),
    ("summary.json", '{"top1": -Infinity}', "-Infinity is not valid JSON"),
    ("summary.json", '{"top1": ' + "9" * 5000 + "}", "cannot be read"),
    ("summary.json", changed(SUMMARY, "top1"), "top1: field required"),
    ("summary.json", changed(SUMMARY, "top1", to="60"), "top1: input should be a valid number"),
    ("summary.json", changed(SUMMARY, "top1", to=[60]), "top1: input"),
    ("summary.json", changed(SUMMARY, "top1", to=None), "top1: input"),
    ("summary.json", changed(SUMMARY, "top1", to=True), "top1: input"),
    ("summary.json", changed(SUMMARY, "top1", to=10**400), "top1: input"),
    ("summary.json", changed(SUMMARY, "top1", to=101), "top1: input should be less than or equal to 100"),
    ("summary.json", changed(SUMMARY, "best_top1", to={}), "best_top1: input"),
    ("summary.json", changed(SUMMARY, "metric", to="model"), "metric: must be top1 or f1"),
    ("summary.json", changed(SUMMARY, "metric", to=["top1"]), "metric: input"),
    ("summary.json", changed(SUMMARY, "seconds", to="long"), "seconds: input"),
    ("summary.json", changed(SUMMARY, "seconds"), "seconds: field required"),
    ("summary.json", changed(SUMMARY, "seed", to=1.5), "seed: input"),
    ("summary.json", changed(SUMMARY, "epochs", to=-1), "epochs: input"),
    ("summary.json", changed(SUMMARY, "size_mb", to=0), "size_mb: input"),
    ("summary.json", changed(SUMMARY, "fp32_size_mb"), "size_mb, fp32_size_mb: must be given together"),
    ("summary.json", changed(SUMMARY, "sqnr_db", to="inf"), "sqnr_db: input"),
    ("summary.json", changed(SUMMARY, "clipping", to=None), "clipping: input"),
    ("environment.json", "[]", "valid dictionary"),
    ("environment.json", "{}", "command: field required"),
    ("environment.json", changed(ENVIRONMENT, "command", to="qat-run"), "command: input"),
    ("environment.json", changed(ENVIRONMENT, "command", to=[1]), "command.0: input"),
    ("environment.json", changed(ENVIRONMENT, "machine", "gpus", to=None), "machine.gpus: input"),
    ("environment.json", changed(ENVIRONMENT, "machine", to=[]), "machine: input"),
    ("environment.json", changed(ENVIRONMENT, "git", to={"commit": "a"}), "git.branch: field required"),
    ("environment.json", changed(ENVIRONMENT, "packages", to={"torch": 2}), "packages.torch: input"),
    ("environment.json", changed(ENVIRONMENT, "resumed", to=[{}]), "resumed.0.command: field required"),
    ("environment.json", b"\xff", "not UTF-8"),
    ("histograms.json", "{}", "valid list"),
    ("histograms.json", "[{}]", "0.layer: field required"),
    ("histograms.json", "[[]]", "0: input"),
    ("histograms.json", f"[{changed(HISTOGRAM, 'bits', to=10**9)}]", "0.bits: input"),
    ("histograms.json", f"[{changed(HISTOGRAM, 'counts', to=[])}]", "0.counts: "),
    ("histograms.json", f"[{changed(HISTOGRAM, 'counts', to=[-1])}]", "0.counts.0: input"),
    ("histograms.json", f"[{changed(HISTOGRAM, 'low', to=None)}]", "0.low: input"),
    ("histograms.json", f"[{changed(HISTOGRAM, 'levels', to='0')}]", "0.levels: input"),
    ("allocation.json", changed(ALLOCATED, "chosen", "value", to=None), "chosen.value: must be a number"),
    ("allocation.json", changed(ALLOCATED, "uniform", 0, "width"), "uniform: width is missing"),
    ("oscillations.csv", OSCILLATION + "1,fc,640,101,0\n", "line 2, oscillating: input"),
    ("export.json", "[]", "valid dictionary"),
    ("export.json", "{}", "run: field required"),
    ("export.json", changed(EXPORTED, "figures", to=[]), "figures: input"),
    ("export.json", changed(EXPORTED, "figures", "static"), "figures.static: field required"),
    ("export.json", changed(EXPORTED, "figures", "onnx_fused", "agreement"), "needs agreement"),
    ("export.json", changed(EXPORTED, "bytes", to={}), "bytes.full_precision"),
    ("export.json", changed(EXPORTED, "bytes", "full_precision", to=0), "bytes.full_precision"),
    ("export.json", changed(EXPORTED, "milliseconds", "onnx", to="fast"), "milliseconds.onnx: input"),
    ("export.json", changed(EXPORTED, "batchnorm_kept", to=[3]), "batchnorm_kept.0: input"),
    ("metrics.csv", "a,b\n1,2\n", "line 2, epoch: must be"),
    ("metrics.csv", "epoch,val_top1\none,2\n", "line 2, epoch: input"),
    ("metrics.csv", "epoch,val_top1\n1.5,2\n", "line 2, epoch: must be a whole number"),
    ("metrics.csv", "epoch,val_top1\n1,2,3\n", "line 2, its cells do not match the columns"),
    ("metrics.csv", "epoch,val_top1\n1,x\n2,3\n", "line 2, val_top1: input"),
    ("metrics.csv", "epoch,lr\n1,2\n", "line 2, val_top1: field required"),
    ("metrics.csv", "epoch,epoch\n1,2\n", "line 2, its cells"),
    ("metrics.csv", b"epoch,val_top1\n1,\xff\n", "not UTF-8"),
    ("steps.csv", "epoch,step,loss\n1,1,2\n", "line 2, lr: field required"),
    ("steps.csv", "epoch,step,loss,lr\n1,-1,2,3\n", "line 2, step: input"),
    ("steps.csv", "epoch,step,loss,lr\n1\n1,1,2,3\n", "line 2, its cells"),
    ("steps.csv", "epoch,step,loss,lr\n1,1," + "9" * 200_000 + ",1\n", "field larger than field limit"),
    ("layers.csv", LAYER + "1,fc,weight,4,maybe,channel,1,1,1,1,1\n", "line 2, signed: input"),
    ("layers.csv", LAYER + "1,fc,weight,400,True,channel,1,1,1,1,1\n", "line 2, bits: input"),
    ("layers.csv", LAYER + "nan,fc,weight,4,True,channel,1,1,1,1,1\n", "line 2, epoch: input"),
    ("error.txt", b"\xff\xfe", "not UTF-8"),
    ("quantizers.txt", b"\xff\xfe", "not UTF-8"),
    ("asked.txt", "../../etc\n", "is not a folder name"),
    ("asked.txt", "a\0b\n", "is not a folder name"),
    ("asked.txt", "x" * 300 + "\n", "is not a folder name"),
    ("asked.txt", b"\xff\n", "not UTF-8"),
    ("config.yaml", "a: [", "config.yaml: cannot be read"),
    ("config.yaml", b"\xff", "config.yaml: cannot be read"),
    ("config.yaml", "[]", "config.yaml: cannot be read"),
]
"""File, content, and a part of the error message."""

FIT: list[tuple[str, str | bytes]] = [
    ("metrics.csv", ""),
    ("metrics.csv", "epoch,val_"),
    ("steps.csv", "epoch,step,loss,lr\n1,1,,nan\n1,2,inf,-inf\n1,3,1e400,1"),
    ("steps.csv", 'epoch,step,loss,lr\n\n1,1,"2",3\n'),
    ("layers.csv", LAYER + '1,"a\nb",weight,4,True,channel,nan,inf,-inf,nan,\n'),
    ("layers.csv", LAYER + "1,\u2028\u0085\ud7ff,input,4,0,tensor,1e308,1e308,1e308,1e308,1e308\n"),
    ("lock", "[]"),
    ("lock", "{}"),
    ("lock", b"\xff"),
    ("lock", '{"process": "x", "host": 3}'),
    ("error.txt", ""),
    ("quantizers.txt", "\n\n\x1b[2J a\0b \u2028" + "x" * 3_000_000),
    ("error.txt", "\x1b[2J a\0b " + "x" * 10_000),
    ("asked.txt", ""),
    ("summary.json", changed(SUMMARY, "best_top1", to=None)),
    ("summary.json", changed(SUMMARY, "seconds", to=1e308)),
    ("summary.json", changed(SUMMARY, "clipping", to="\ud800\x00<script>")),
    ("summary.json", changed(SUMMARY, "extra", to={"deep": [1, "2", None]})),
    ("summary.json", changed(SUMMARY, "metric")),
    ("environment.json", json.dumps(ENVIRONMENT | {"later": 1})),
    ("histograms.json", "[]"),
    ("histograms.json", f"[{changed(HISTOGRAM, 'levels')}]"),
    ("export.json", changed(EXPORTED, "figures", "onnx_fused")),
]
"""File and content that are odd but valid."""


RECORDS: dict[str, Any] = {
    file.name: file for file in vars(records).values() if isinstance(file, records.JsonFile | records.CsvFile)
}
FIRST = {name: row for name, *row in reversed(UNFIT)}
READ_ALONE = [row for row in UNFIT if row[0] in RECORDS and FIRST[row[0]] != [*row[1:]]]
"""Further cases of a file, checked only by reading it; all verbs are checked with the first case of each file."""


@pytest.mark.parametrize(("name", "content", "message"), READ_ALONE, ids=[f"{row[0]}: {row[2]}" for row in READ_ALONE])
def test_reading_names_what_does_not_fit(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UnreadableError) as caught:
        RECORDS[name].read(tmp_path)
    assert f"{name}: cannot be read (" in str(caught.value) and message in str(caught.value)


SHOWN_BY_ALL = [row for row in UNFIT if row not in READ_ALONE]


@pytest.mark.parametrize(
    ("name", "content", "message"), SHOWN_BY_ALL, ids=[f"{i}-{row[0]}" for i, row in enumerate(SHOWN_BY_ALL)]
)
def test_what_does_not_fit_is_named(
    name: str, content: str | bytes, message: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(runs, name, content)
    if name == "config.yaml":
        assert ask(["RUN"], runs, tmp_path / "out", capsys)[0] == 2
        code, printed, _ = ask(["status", "RUNS"], runs, tmp_path / "out", capsys)
        assert code == 0 and f"{SHOWN}, 1 unreadable" in printed
        assert export([str(runs / "bad")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        return
    everything = check_all(runs, tmp_path / "out", capsys)
    found = re.search(rf"{re.escape(name)}: cannot be read \([^\n]*{re.escape(message)}", everything.replace("\n", " "))
    squeezed = everything.replace(" ", "")  # a table may wrap a sentence anywhere
    assert found or (f"{name}:cannotberead(" in squeezed and message.replace(" ", "") in squeezed), everything[-3000:]


@pytest.mark.parametrize(("name", "content"), FIT, ids=[f"{i}-{row[0]}" for i, row in enumerate(FIT)])
def test_what_is_merely_odd_is_shown(
    name: str, content: str | bytes, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(runs, name, content)
    assert "cannot be read" not in check_all(runs, tmp_path / "out", capsys)


@pytest.mark.parametrize("name", ["summary.json", "metrics.csv", "export.json", "asked.txt", "lock"])
def test_what_is_no_file(name: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for make in (lambda path: path.mkdir(), lambda path: os.mkfifo(path)):
        path = path_of(runs, name)
        path.unlink() if path.is_file() else None
        make(path)
        everything = check_all(runs, tmp_path / "out", capsys)
        assert name == "lock" or "cannot be read (" in everything
        path.rmdir() if path.is_dir() else path.unlink()


# Random corruption by hypothesis

MUTABLE = (
    *("summary.json", "environment.json", "histograms.json", "export.json", "metrics.csv", "steps.csv", "layers.csv"),
    *("lock", "error.txt", "asked.txt", "allocation.json", "oscillations.csv"),
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**20, -(10**400), 2**63, 1e308, -1e-308, 0]),
    st.floats(),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every value in a JSON content."""
    yield path
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(inside)[:12]:
        yield from places(value, (*path, key))


@st.composite
def mutated_json(draw: st.DrawFn, text: str) -> str:
    """Draw a JSON file with some values replaced, deleted or inserted."""
    content: Any = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([*places(content)][1:] or [("x",)]))
        place = content
        for key in way:
            place = place[key]
        how = draw(st.sampled_from(["replace", "delete", "insert"]))
        if not isinstance(place, dict | list):
            return json.dumps(draw(VALUES))
        if how == "replace" and (isinstance(place, list) or last in place):
            place[last] = draw(VALUES)
        elif how == "delete" and (isinstance(place, list) or last in place):
            del place[last]
        elif isinstance(place, dict):
            place[draw(st.text(max_size=8))] = draw(VALUES)
        else:
            place.append(draw(VALUES))
    return json.dumps(content)


@st.composite
def mutated_text(draw: st.DrawFn, text: str) -> bytes:
    """Draw a file with some bytes replaced, inserted, duplicated or cut off."""
    data = text.encode()
    for _ in range(draw(st.integers(1, 4))):
        a, b = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
        b = min(b, a + 40) if draw(st.booleans()) else b
        new = draw(st.one_of(st.binary(max_size=6), st.sampled_from([b"", b"\n", b",", b'"', b"nan", b"-1", b"1e999"])))
        data = data[:a] + new + data[b:] if draw(st.booleans()) else data[:b]
    return data


@st.composite
def mutated(draw: st.DrawFn, sound: Path) -> dict[str, bytes | str]:
    """Draw one to three corrupted files of a run."""
    found: dict[str, bytes | str] = {}
    for name in draw(st.lists(st.sampled_from(MUTABLE), min_size=1, max_size=3, unique=True)):
        text = OTHERS.get(name) or path_of(sound, name).read_text()
        text = text if len(text) < 20_000 else text[: text.index("\n", 2000) + 1]
        as_json = name.endswith(".json") and draw(st.booleans())
        found[name] = draw(mutated_json(text) if as_json else mutated_text(text))
    return found


def _mutations(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=[*HealthCheck])
    @given(mutated(sound))
    def tried(files: dict[str, bytes | str]) -> None:
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        shutil.copytree(sound, tmp_path / "runs")
        for name, content in files.items():
            spoil(tmp_path / "runs", name, content)
        check_all(tmp_path / "runs", tmp_path / "out", capsys)
        assert export([str(tmp_path / "runs" / "bad"), "--formats", "safetensors"]) == 2  # it has no checkpoint
        assert capsys.readouterr().err.count("\n") == 1

    tried()


def test_mutated_records(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _mutations(sound, tmp_path, capsys, 25)


@pytest.mark.reliability
def test_many_mutated_records(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _mutations(sound, tmp_path, capsys, 300)


def _mutated_configs(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], examples: int) -> None:
    """An unreadable config makes its own run unreadable, with a one-line message, and affects no other run."""
    shutil.copytree(sound, tmp_path / "runs")
    text = (sound / "bad" / "config.yaml").read_text()

    @settings(max_examples=examples, deadline=None, suppress_health_check=[*HealthCheck])
    @given(mutated_text(text))
    def tried(content: bytes) -> None:
        spoil(tmp_path / "runs", "config.yaml", content)
        for verb in VERBS:
            code, printed, err = ask(verb, tmp_path / "runs", tmp_path / "out", capsys)
            assert code == 0 or (code == 2 and verb == ["RUN"] and err.count("\n") == 1), (verb, err)
            assert "Traceback" not in printed + err
            if verb[0] == "status":
                assert SHOWN in " ".join(printed.split()) or "3 finished" in printed
        assert export([str(tmp_path / "runs" / "bad"), "--formats", "safetensors"]) == 2  # it has no checkpoint
        assert capsys.readouterr().err.count("\n") == 1

    tried()


def test_mutated_configs(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _mutated_configs(sound, tmp_path, capsys, 12)


@pytest.mark.reliability
def test_many_mutated_configs(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _mutated_configs(sound, tmp_path, capsys, 300)


# The record types


def test_descriptions_are_of_what_is_written() -> None:
    assert list(records.LayerRow.__annotations__) == ["epoch", *LayerNoise.__dataclass_fields__]
    assert {*Progress.__annotations__} == {*State.__dataclass_fields__}


def test_records_that_are_written_fit(tmp_path: Path) -> None:
    """NaN and infinity become null, and a name that is not valid text is still written."""
    records.SUMMARY.write(tmp_path, SUMMARY | {"sqnr_db": float("nan"), "run_dir": "b\udcff"})  # type: ignore[arg-type, operator]
    found = records.SUMMARY.read(tmp_path)
    assert found is not None and found["sqnr_db"] is None and found["run_dir"] == "b\\udcff"


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("price",), "hessian", "price: string should match"),
        (("beside",), "x", "beside: string should match"),
        (("tensors", 0, "price"), {"four": 1.0}, "tensors.0.price.four"),
        (("tensors", 0, "beside"), {"": 1.0}, "tensors.0.beside."),
        (("figures",), [], "figures: list should have at least 1 item"),
        (("figures",), ["GB"], "costs: GB is missing"),
        (("uniform", 0, "value"), None, None),
    ],
)
def test_what_a_choice_of_bits_may_hold(
    tmp_path: Path, keys: tuple[Any, ...], value: object, message: str | None
) -> None:
    (tmp_path / "allocation.json").write_text(changed(ALLOCATED, *keys, to=value))
    if message is None:
        assert records.ALLOCATION.read(tmp_path) is not None
        return
    with pytest.raises(UnreadableError, match=re.escape(message)):
        records.ALLOCATION.read(tmp_path)


def test_the_bits_of_an_export(tmp_path: Path) -> None:
    """The requested bits, or the average bit-width if bits were chosen."""
    means = {"mean_weight_bits": 3.5, "mean_activation_bits": 4.25}
    chosen = {key: value for key, value in EXPORTED.items() if key not in ("weight_bits", "activation_bits")}
    for content, message in (
        (EXPORTED | means, "resnet20, 4/4 bits (weights/activations), octav"),
        (
            chosen | means,
            "resnet20, 3.50/4.25 bits (average of weights/activations, over all quantized tensors), octav",
        ),
    ):
        (tmp_path / "export.json").write_text(json.dumps(content))
        result = records.EXPORT.read(tmp_path)
        assert result is not None and export_summary.text(result).startswith(message)


def test_no_record_is_no_error(tmp_path: Path) -> None:
    assert records.SUMMARY.read(tmp_path) is None and records.STEPS.read(tmp_path / "nowhere") == []
    with pytest.raises(UnreadableError, match="cannot be read"):
        records.SUMMARY.read(tmp_path / ("x" * 300))
