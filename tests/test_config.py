"""Configs: defaults, errors, and what identifies a run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qat_runner.cli.run import config_dir
from qat_runner.config import (
    allocation_of,
    changed,
    check_keys_of_training,
    clipping_label,
    differences,
    gradient_label,
    identity,
    run_name,
    trained_of,
)
from qat_runner.config.composing import command, compose_config
from qat_runner.errors import ConfigError
from qat_runner.experiment import build
from qat_runner.models import BERTS, DECODERS, MODELS
from qat_runner.quant import Octav, Percentile
from tests.conftest import Compose


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def test_defaults(composed: Compose) -> None:
    config = composed()
    assert (config.model.name, config.dataset.name, config.clipping.name, config.gradient.name) == (
        "resnet18",
        "digits",
        "octav",
        "mph",
    )
    assert (config.weight_bits, config.activation_bits, config.first_last_bits) == (4, 4, 8)
    assert config.data_dir == "data"


def test_options_of_estimators_and_of_learned_starts_are_in_names(composed: Compose) -> None:
    names = {run_name(composed("gradient=ewgs", f"gradient.options.delta={delta}")) for delta in (0.001, 0.02)}
    assert len(names) == 2 and all("_octav_ewgs_" in name for name in names)
    assert gradient_label(composed("gradient=ewgs")) == "ewgs"
    assert gradient_label(composed("gradient=ewgs", "gradient.options.delta=0.02")) == "ewgs(delta=0.02)"
    assert clipping_label(composed("clipping=lsq", "clipping.start=octav", "weights=w.pt", "mode=ptq")) == (
        "lsq-from-octav"
    )


def test_every_option_of_every_group_composes(composed: Compose) -> None:
    assert options("model") == sorted((*MODELS, *BERTS, *DECODERS))
    needed = {"squad": ["dataset=squad", "model=bert_base"], "decoder": ["dataset=text"]}
    needed |= {key: ["dataset=text", "model=decoder"] for key in ("text", "text_scratch")}
    for group in ("model", "dataset", "clipping", "gradient", "recipe"):
        for option in options(group):
            others = [word for word in needed.get(option, []) if not word.startswith(f"{group}=")]
            composed(*others, f"{group}={option}", "mode=ptq", "weights=w.pt")
    for option in options("recipe/paper"):
        config = composed("dataset=imagenet", f"model={option}")
        assert config.epochs == config.recipe.scratch.epochs


def test_values_that_follow_from_others(composed: Compose) -> None:
    config = composed("bits=6", "weight_bits=3", "epochs=2", "lr=0.5")
    assert (config.weight_bits, config.activation_bits, config.epochs, config.lr) == (3, 6, 2, 0.5)
    assert composed("mode=retrain", "weights=w.pt").epochs == config.recipe.retrain.epochs
    assert composed("clipping=percentile", "clipping.q=99.9").clipping.method == Percentile(99.9)


def test_data_dir_from_the_environment(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_DATA_DIR", "/elsewhere")
    assert composed().data_dir == "/elsewhere"
    assert composed("data_dir=here").data_dir == "here"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["bits=1"], "bits=1: must be 2 to 16, or 32"),
        (["bits=17"], "bits=17: must be"),
        (["weight_bits=0"], "weight_bits=0: must be"),
        (["first_last_bits=1"], "first_last_bits=1: must be"),
        (["mode=ptq"], "mode=ptq: needs weights"),
        (["mode=ptq", "weights=w.pt", "bits=32"], "nothing to quantize"),
        (["weights=w.pt"], "mode=scratch starts from random weights"),
        (["epochs=0"], "epochs=0: must be 1 to 100000"),
        (["lr=0"], "lr=0.0: must be above 0 and at most 1e"),
        (["lr=nan"], "lr=nan: must be above 0 and at most"),
        (["seed=-1"], "seed=-1: must be 0 to 4294967295"),
        (["batch_size=0"], "batch_size=0"),
        (["limit_val_batches=0"], "limit_val_batches=0"),
        (["clipping=percentile", "clipping.q=120"], r"q=120\.0: a percentile must lie in"),
        (["clipping=max", "clipping.q=99"], "clipping=max: clipping 'max' has no option 'q'"),
        (["clipping=octav", "clipping.start=octav"], "clipping=octav: clipping 'octav' has no option 'start'"),
        (["clipping=lsq", "clipping.start=max"], "clipping=lsq: start='max': must be one of lsq, octav"),
        (["gradient=ewgs", "gradient.options.delta=-1"], "gradient=ewgs: delta=-1: must be 0 or more, and finite"),
        (["gradient=mph", "+gradient.options.q=1"], "gradient=mph: gradient 'mph' is a pair of estimators and has no"),
        (["clipping.iterations=0"], "iterations=0"),
        (["clipping=static_octav"], "no trained weights to calibrate on"),
        (
            ["clipping=static_octav", "clipping.calibration_batches=0", "mode=ptq", "weights=w.pt"],
            "needs data to calibrate",
        ),
        (["recipe.scratch.decay_factor=-1"], "decay_factor=-1.0: must be above 0"),
        (["seed=5000000000"], "seed=5000000000: must be 0 to 4294967295"),
        (["clipping.eval_mode=mean"], "clipping.eval_mode=mean: must be one of"),
        (["recipe.scratch.max_grad_norm=0"], "max_grad_norm=0.0: must be above 0"),
        (["recipe.scratch.warmup_epochs=-1"], "warmup_epochs=-1.0: must be 0 to"),
        (["mode=finetune"], "recipe=digits has no such stage; its stages are scratch, retrain, long_retrain"),
        (["dataset=squad", "model=bert_base", "mode=scratch"], "mode=scratch: recipe=squad has no such stage"),
        (["dataset=squad", "model=bert_base", "weights=w.pt"], "mode=finetune starts from model.checkpoint"),
        (["dataset=squad", "model=bert_base", "dataset.max_length=4"], "dataset.max_length=4: must be 8 to"),
        (["dataset=squad", "model=bert_base", "dataset.stride=0"], "dataset.stride=0: must be 1 to"),
        (["recipe.scratch.momentum=1"], "recipe.scratch.momentum=1.0"),
        (["dataset.mean=[1,2]"], "dataset.mean"),
        (["dataset.std=[0]"], "dataset.std"),
        (["gradient.name=x"], "gradient.name=x: must be one of"),
        (["+foo=1"], "unknown key 'foo'"),
        (
            ["clipping=lsq", "rules=[{match: '*.weight', clipping: octav, dynamic: false}]"],
            "rules.dynamic=false: mode=",
        ),
        (["clipping=lsq", "clipping.sync=true"], "clipping.sync=true: applies only to scalars that are solved in"),
        (["clipping=lsq", "clipping.eval_mode=running"], "clipping.eval_mode=running: applies only to solved scalars"),
        (["clipping=lsq", "clipping.dynamic=true"], "clipping.dynamic=true: must be false: clipping=lsq learns its"),
        (["clipping.sync=true", "mode=ptq", "weights=w.pt"], "applies only to training, and mode=ptq does not train"),
        (["clipping.sync=true", "mode=evaluate", "weights=w.pt"], "applies only to training, and mode=evaluate does"),
        (["clipping=pact", "range=full"], "range=full: cannot be set with clipping=pact, which has its own ranges"),
        (["clipping=pact", "weight_range=oriented"], "weight_range=oriented: cannot be set with clipping=pact"),
        (["allocated=[{match: '*', bits: 2}]"], "allocated: cannot be set; the runner fills it in"),
        (["+fingerprints.x=1"], "fingerprints: cannot be set; the runner fills it in"),
        (["+model.foo=1"], "unknown key 'model.foo'"),
    ],
)
def test_invalid_configs_are_rejected(composed: Compose, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        composed(*overrides)


def test_ranges(composed: Compose) -> None:
    plain = composed("bits=4")
    assert {plain.weight_range, plain.activation_range} == {"twos_complement"}
    assert not any("range" in key for key in identity(plain))
    oriented = composed("range=oriented")
    text = {key: value for key, value in identity(oriented).items() if key not in identity(plain)}
    assert text == {"weight_range": "oriented", "activation_range": "oriented"}
    assert identity(composed("weight_range=oriented", "activation_range=oriented")) == identity(oriented)
    assert identity(composed("range=full", "bits=32")) == identity(composed("bits=32"))
    for overrides, label in (
        (("range=full",), "octav-full"),
        (("weight_range=oriented",), "octav-weights-oriented"),
        (
            ("clipping=max", "range=full", "activation_range=oriented"),
            "-".join(("max", "weights-full", "activations-oriented")),
        ),
    ):
        assert f"_4bit_{label}_" in run_name(composed(*overrides))
    tensor = oriented.quantization.tensor("layer", "Conv2d", "weight")
    assert tensor.range == "oriented"
    with pytest.raises(ConfigError, match="range=round: must be one of twos_complement, full, oriented"):
        composed("range=round")
    with pytest.raises(ConfigError, match=r"clipping=max: .* no option 'refine'"):
        composed("clipping=max", "clipping.refine=8")


def test_without_training_octav_accounts_for_the_missing_code(composed: Compose) -> None:
    ptq = ("mode=ptq", "weights=w.pt")
    for overrides in (ptq, (*ptq, "clipping=static_octav"), ("mode=allocate", "weights=w.pt", "budget=4")):
        config = composed(*overrides)
        assert config.clipping_in_mode.method == Octav(missing_code=True, refine=64, warm_iterations=6)
        assert {config.quantization.tensor("l", "Linear", "input").clipping} == {config.clipping_in_mode.method}
        text = {key: identity(config)[f"clipping.{key}"] for key in ("missing_code", "refine")}
        assert text == {"missing_code": True, "refine": 64}
        retrained = changed(config, mode="retrain", budget=None)  # as in a run of that mode
        assert retrained.quantization.tensor("l", "Linear", "input").clipping == Octav(warm_iterations=6)
    papers = composed(*ptq, "clipping.missing_code=false", "clipping.refine=0").clipping_in_mode.method
    training = (composed(), composed("mode=retrain", "weights=w.pt"))
    assert all(config.clipping_in_mode.method == papers for config in training)
    assert composed(*ptq, "clipping=max").clipping_in_mode.refine is None


def test_identity_and_name(composed: Compose) -> None:
    config = composed()
    assert run_name(config) == run_name(composed("bits=4", "runs_dir=x", "data_dir=y", "overwrite=true"))
    assert run_name(config).startswith("resnet18_digits_scratch_4bit_octav_mph_seed0_")
    assert len({run_name(composed(o)) for o in ("bits=5", "seed=1", "lr=0.2", "clipping=max", "weight_bits=5")}) == 5
    baselines = {run_name(composed("bits=32", o)) for o in ("clipping=max", "gradient=ste", "first_last_bits=4")}
    assert len(baselines) == 1
    assert baselines.pop().startswith("resnet18_digits_scratch_fp32_seed0_")
    evaluation = composed("mode=evaluate", "weights=w.pt")
    assert run_name(evaluation) == run_name(replace(evaluation, epochs=99, lr=3.0))
    assert differences(identity(config), identity(composed("seed=1", "dataset.image_size=16"))) == [
        "dataset.image_size",
        "seed",
    ]


def test_other_methods_beside_learned_scalars_are_dynamic(composed: Compose) -> None:
    """clipping=lsq sets dynamic=false, which does not apply to tensors to which a rule gives another method."""
    config = composed("clipping=lsq", "rules=[{match: '*.weight', clipping: octav}]")
    weight, activation = (config.quantization.tensor("conv1", "Conv2d", name) for name in ("weight", "input"))
    assert weight.dynamic and weight.clipping.name == "octav" and activation.clipping.learned
    rules = "rules=[{match: '*.weight', clipping: octav}]"
    names = {run_name(composed("clipping=lsq", rules, f"gradient={name}")) for name in ("mph", "ste")}
    assert len(names) == 2 and len({run_name(composed("clipping=lsq", f"gradient={g}")) for g in ("mph", "ste")}) == 1
    composed("rules=[{match: '*.input', clipping: lsq}]")  # from scratch: nothing is static


def test_dynamic_scalars_from_rules_can_be_frozen(composed: Compose) -> None:
    freezing = ("clipping=lsq", "epochs=2", "recipe.freeze_scalars_at=1")
    assert composed(*freezing, "rules=[{match: layer3.*, clipping: octav}]").freezing
    with pytest.raises(ConfigError, match="clipping=lsq has no dynamic scalars to freeze"):
        composed(*freezing)


def test_how_probes_are_trained_is_part_of_the_identity(composed: Compose) -> None:
    """Bits that are chosen after retraining depend on it, and so does a run that uses these bits, in any mode."""
    ways = ("recipe.retrain.lr=0.5", "accumulate=4", "recipe.distill=full_precision")
    chosen = ["weights=w.pt", "budget=4", "retrain_steps=5"]
    for words in ([*chosen, "mode=allocate"], [*chosen, "policy=auto", "mode=ptq"]):
        assert len({run_name(composed(*words, *way)) for way in ([], *([one] for one in ways))}) == 4
        plain = [word for word in words if word != "retrain_steps=5"]
        assert run_name(composed(*plain)) == run_name(composed(*plain, "recipe.retrain.lr=0.5"))


CALIBRATED = ["clipping.calibration_batches=2", "clipping.calibration_batch_size=32"]
OF_OCTAV = ["clipping.refine=64", "clipping.missing_code=true"]


@pytest.mark.parametrize(
    ("words", "ways", "names"),
    [
        (["clipping=static_octav"], CALIBRATED, 3),
        (["clipping=lsq"], CALIBRATED, 3),
        (["clipping=lsq", "retrain_steps=5"], CALIBRATED, 3),
        (["clipping.eval_mode=running"], CALIBRATED, 3),
        (["clipping.eval_mode=running", "retrain_steps=5"], CALIBRATED, 1),
        ([], CALIBRATED, 1),
        (["retrain_steps=5"], OF_OCTAV, 3),
        ([], OF_OCTAV, 1),
    ],
)
def test_how_probes_are_quantized_is_part_of_the_identity(
    words: list[str], ways: list[str], names: int, composed: Compose
) -> None:
    """Although a run that chooses bits neither calibrates nor trains itself; its command contains the keys, too."""
    asked = ["mode=allocate", "weights=w.pt", "max_drop=1", *words]
    configs = [composed(*asked, *way) for way in ([], *([one] for one in ways))]
    assert len({run_name(config) for config in configs}) == names
    text = [command(config) or "" for config in configs]
    assert all(text) and len({*text}) >= names


def test_calibration_of_probes_needs_batches(composed: Compose) -> None:
    with pytest.raises(ConfigError, match="calibration_batches=0: must be 1 or more, since clipping=lsq needs data"):
        composed("mode=allocate", "weights=w.pt", "budget=4", "clipping=lsq", "clipping.calibration_batches=0")


def test_training_with_chosen_bits_needs_a_stage_for_retraining(composed: Compose) -> None:
    with pytest.raises(ConfigError, match="retrain"):
        trained_of(composed("mode=allocate", "weights=w.pt", "budget=4", "recipe.retrain=null"))


@pytest.mark.parametrize(
    "remedy",
    [
        *("recipe.distill=full_precision", "recipe.freeze_scalars_at=0.5", "recipe.batchnorm_batches=3"),
        *("oscillations.freeze_to=0.01", "clipping.refine=64"),
    ],
)
def test_bits_auto_searches_as_qat_bits_with_the_same_keys(remedy: str, composed: Compose) -> None:
    """So that each of them finds the result of the other."""
    asked, steps, auto = ["weights=w.pt", "max_drop=1"], "retrain_steps=400", ["mode=retrain", "policy=auto"]
    own = run_name(allocation_of(composed(*asked, *auto, remedy, steps)))
    searched = composed("mode=allocate", *asked, remedy, steps)
    assert own == run_name(searched) == run_name(allocation_of(trained_of(searched)))
    assert own != run_name(composed("mode=allocate", *asked, steps))
    unretrained = run_name(allocation_of(composed(*asked, *auto, remedy)))  # no remedy has an effect here
    assert unretrained == run_name(composed("mode=allocate", *asked))


def test_kernels_of_quantization_are_not_in_the_identity_of_full_precision(composed: Compose) -> None:
    ways = ("backend=eager", "log_excess_mse=true", "backend=auto")
    assert len({run_name(composed("bits=32", way)) for way in ways}) == 1


def test_keys_about_oscillations_without_effect_are_not_in_the_identity(composed: Compose) -> None:
    ways = [[], *([f"oscillations.{key}=0.2"] for key in ("momentum", "threshold", "freeze_from"))]
    ways += [["oscillations.max_bits=8"]]
    for watched, names in (([], 1), (["oscillations.measure=true"], 4), (["oscillations.freeze_to=0.01"], 5)):
        assert len({run_name(composed(*watched, *way)) for way in ways}) == names


def test_static_scalars_are_the_same_with_each_eval_mode(composed: Compose) -> None:
    static = ["clipping=static_octav", "mode=retrain", "weights=baseline"]
    ways = [[], ["clipping.eval_mode=running"], ["clipping.eval_mode=last"]]
    assert len({run_name(composed(*static, *way)) for way in ways}) == 1
    assert len({run_name(composed(*way)) for way in ways}) == 3
    rules = "rules=[{match: conv1.weight, clipping: octav, dynamic: true}]"
    assert len({run_name(composed(*static, rules, *way)) for way in ways}) == 3


def test_full_precision_has_no_bits_to_choose(composed: Compose) -> None:
    """For example, a row of an experiment whose other rows choose bits."""
    plain = composed("bits=32")
    beside = composed("policy=auto", "budget=4", "weight_bits=32", "activation_bits=32", "clipping.sync=true")
    assert run_name(beside) == run_name(plain) and beside.policy is None and not beside.limits
    with pytest.raises(ConfigError, match="weight_bits=32, activation_bits=32: mode=allocate has nothing to choose"):
        composed("mode=allocate", "weights=baseline", "budget=4", "bits=32")


def test_keys_of_training_need_a_run_that_trains(composed: Compose) -> None:
    """In a sweep over modes, one that trains is enough; without epochs, there is nothing to reject."""
    ptq, retrain = (("weights=w.pt", f"mode={mode}", "epochs=2") for mode in ("ptq", "retrain"))
    rows = [(compose_config(words), composed(*words)) for words in (ptq, retrain, ptq[:2])]
    check_keys_of_training(rows)
    check_keys_of_training(rows[2:])
    with pytest.raises(ConfigError, match="epochs=2: applies only to training, and mode=ptq does not train"):
        check_keys_of_training([rows[0], rows[2]])


def test_keywords_for_weights_are_not_paths(composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed("model=resnet18", "dataset=fake", "mode=evaluate", "weights=torchvision")
    name = run_name(config)
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "notes.txt").write_text("a clone of something")
    monkeypatch.chdir(tmp_path)
    assert run_name(config) == name and config.with_fingerprints().fingerprints == {}


def test_a_run_that_does_not_repeat_to_the_bit_is_a_different_one(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # restored after the test
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    small = ("dataset=fake", "dataset.image_size=8", "model=resnet20", "device=cpu", "bits=32")
    repeatable, timed = composed(*small), composed(*small, "cudnn_benchmark=true")
    assert differences(identity(repeatable), identity(timed)) == ["cudnn_benchmark"]
    for config in (timed, repeatable):
        build(config, None)
        assert torch.backends.cudnn.benchmark is config.cudnn_benchmark
        assert torch.backends.cudnn.deterministic


def test_the_folder_of_configs_is_found() -> None:
    assert (config_dir() / "config.yaml").is_file()
    assert config_dir() == Path(__file__).resolve().parents[1] / "configs"
