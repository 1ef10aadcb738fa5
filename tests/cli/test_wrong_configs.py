"""Any command is either carried out, or rejected with one sentence and exit code 2, leaving nothing behind."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qat_runner.cli.run import config_dir, main
from qat_runner.experiment import running
from tests.tiny import tiny_bert, tiny_squad

NUMBERS = [
    *("0", "1", "-1", "2", "7", "64", "1e-3", "1e400", "nan", "inf", "-0.5"),
    *("null", "true", "abc", "[1,2]", "''", "{a:1}"),
]
KEYS = [
    *("bits", "weight_bits", "activation_bits", "first_last_bits", "epochs", "batch_size", "lr", "seed", "accumulate"),
    *("noise_batches", "limit_train_batches", "limit_val_batches", "checkpoint_minutes", "distributed_timeout"),
    *("dataset.image_size", "dataset.num_classes", "dataset.mean", "dataset.std", "dataset.val_batch_size"),
    *("dataset.max_length", "dataset.stride", "dataset.train_questions", "dataset.n_best", "model.width"),
    *("clipping.iterations", "clipping.warm_iterations", "clipping.q", "clipping.points", "clipping.alpha"),
    *("clipping.calibration_batches", "recipe.scratch.momentum", "recipe.freeze_scalars_at"),
    *("recipe.scratch.warmup_epochs", "recipe.scratch.label_smoothing", "recipe.scratch.decay_every"),
    *("recipe.scratch.decay_factor", "recipe.distill_temperature", "recipe.distill_weight"),
]
WORDS = {
    "mode": ["scratch", "retrain", "long_retrain", "finetune", "ptq", "evaluate", "auto", "train"],
    "weights": ["null", "nothing.pt", "torchvision", "baseline", "bert", "text.pt"],
    "amp": ["none", "bf16", "fp16", "half"],
    "backend": ["eager", "triton", "auto", "fast"],
    "device": ["cpu", "cuda", "cuda:7", "tpu", "cpu:1"],
    "resume": ["auto", "force", "never", "maybe"],
    "clipping.eval_mode": ["dynamic", "running", "last", "mean"],
    "clipping.sync": ["true", "false", "maybe"],
    "clipping.dynamic": ["true", "false"],
    "conv_granularity": ["channel", "tensor", "row"],
    "linear_granularity": ["auto", "channel", "tensor", "row"],
    "activation_granularity": ["tensor", "token", "row"],
    "dataset.augment": ["none", "crop", "crop_flip", "mixup"],
    "dataset.padding": ["longest", "max_length", "none"],
    "dataset.resizing": ["pillow", "tensor", "none"],
    "dataset.decode": ["cpu", "gpu", "none"],
    "model.stem": ["auto", "small", "imagenet", "large"],
    "model.checkpoint": ["bert", "null", "nowhere/at/all", "."],
    "recipe.distill": ["none", "full_precision", "half"],
    "recipe.scratch.schedule": ["step", "cosine", "linear", "exp"],
    "recipe.scratch.optimizer": ["sgd", "adamw", "lion"],
    "run_dir": ["null", "file", "full", "new/run"],
    "data_dir": ["data", "nowhere", "file"],
}
GROUPS = ["model", "dataset", "clipping", "gradient", "recipe", "+row", "+experiment", "+stand_in"]


def overrides() -> st.SearchStrategy[list[str]]:
    options = {group: sorted(p.stem for p in (config_dir() / group.lstrip("+")).glob("*.yaml")) for group in GROUPS}
    chosen = [st.sampled_from([f"{group}={name}" for name in [*names, "nonsense"]]) for group, names in options.items()]
    words = [st.sampled_from([f"{key}={value}" for value in values]) for key, values in WORDS.items()]
    numbers = st.builds("{}={}".format, st.sampled_from(KEYS), st.sampled_from(NUMBERS))
    odd = ["bits", "=4", "+", "~model", "nokey=1", "a.b.c=2", "bits=4=5", "model=[", "--nonsense", "${bits}"]
    broken = st.sampled_from(odd)
    one = st.one_of(*chosen, *words, numbers, numbers, broken)
    return st.lists(one, min_size=1, max_size=5, unique_by=lambda text: text.partition("=")[0])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    tiny_bert(folder / "bert")
    tiny_squad(folder / "data" / "squad")
    (folder / "file").write_text("a file")
    (folder / "text.pt").write_text("no weights")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("years of work")
    return folder


@pytest.mark.reliability
@given(args=overrides(), sweep=st.booleans())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_combination_is_carried_out_or_rejected(
    args: list[str], sweep: bool, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Runs are not carried out, which would take hours. Building them may still find something to reject.
    monkeypatch.setattr(running, "_run", lambda config, folder: {"metric": "top1", "top1": 0.0})
    before = {str(path) for path in place.rglob("*")}
    code = main([*(["-m"] if sweep else []), *args])
    said = capsys.readouterr()
    assert code in (0, 2), said.err
    assert "Traceback" not in said.err + said.out
    if code == 2:
        (sentence,) = said.err.strip().splitlines()
        assert sentence.startswith("qat-run: ") and len(sentence) > 20
        left = {str(path) for path in place.rglob("*")} - before
        assert not {path for path in left if "/runs/" not in path and not path.endswith("/runs")}, left
    assert (place / "full" / "thesis.txt").is_file()
