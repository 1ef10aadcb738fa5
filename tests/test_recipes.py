"""The shipped recipes, as they are composed: those of the paper (Appendix E.1), and long retraining in all of them."""

from dataclasses import asdict, replace

import pytest
from torch import nn

from qat_runner.config import Config, StageConfig, config_dir, from_hydra
from qat_runner.config.composing import compose_config
from qat_runner.config.schema import Optimizer
from qat_runner.training.recipe import make_optimizer

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
SCRATCH = {  # epochs, GPUs x batch, lr, weight decay, epochs between decays
    "resnet18": (150, 8 * 64, 0.1, 1e-4, 30),
    "resnet34": (150, 8 * 64, 0.1, 1e-4, 30),  # not in the paper, as ResNet-18
    "resnet50": (150, 8 * 64, 0.1, 1e-4, 30),
    "resnet101": (80, 8 * 64, 0.1, 1e-4, 30),
    "mobilenet_v2": (300, 8 * 128, 0.2, 4e-5, 100),
    "mobilenet_v3_small": (300, 8 * 128, 0.2, 1e-5, 100),
    "mobilenet_v3_large": (300, 8 * 128, 0.2, 1e-5, 100),
}
RETRAIN = {  # epochs, GPUs x batch, lr, epochs between decays
    "resnet18": (30, 4 * 64, 1e-4, 10),
    "resnet34": (30, 4 * 64, 1e-4, 10),
    "resnet50": (15, 4 * 64, 1e-4, 5),
    "resnet101": (15, 4 * 64, 1e-4, 5),
    "mobilenet_v2": (30, 4 * 128, 1e-2, 10),
    "mobilenet_v3_small": (30, 4 * 128, 1e-2, 10),
    "mobilenet_v3_large": (30, 4 * 128, 1e-2, 10),
}
DATASETS = sorted(path.stem for path in (config_dir() / "recipe").glob("*.yaml"))
STAND_INS = sorted(path.stem for path in (config_dir() / "stand_in").glob("*.yaml"))


def composed(*overrides: str) -> Config:
    return from_hydra(compose_config([*overrides, "bits=4"]))


def sgd(epochs: int, batch_size: int, lr: float, weight_decay: float, decay_every: int) -> StageConfig:
    """Return a stage with what all those of the paper's vision networks share: momentum 0.9, lr x 0.1 at each decay."""
    schedule = {"schedule": "step", "decay_every": decay_every, "decay_factor": 0.1, "warmup_epochs": 0.0}
    return StageConfig(epochs, batch_size, lr, "sgd", momentum=0.9, weight_decay=weight_decay, **schedule)


def scratch_of_paper(model: str) -> StageConfig:
    return sgd(*SCRATCH[model])


def retrain_of_paper(model: str) -> StageConfig:
    epochs, batch_size, lr, decay_every = RETRAIN[model]
    return sgd(epochs, batch_size, lr, SCRATCH[model][3], decay_every)


def long_retrain_of_paper(model: str) -> StageConfig:
    """Section 5.2: from scratch, but with trained weights and lr x 0.01; 150 epochs for ResNets, 300 for MobileNets."""
    scratch = scratch_of_paper(model)
    return replace(scratch, lr=pytest.approx(scratch.lr * 0.01), epochs=150 if model in RESNETS else 300)


@pytest.mark.parametrize("model", SCRATCH)
def test_the_papers_recipes(model: str) -> None:
    assert {path.stem for path in (config_dir() / "recipe" / "paper").glob("*.yaml")} == {*SCRATCH}
    recipe = composed(f"model={model}", "dataset=imagenet").recipe
    assert recipe.scratch == scratch_of_paper(model)
    assert recipe.retrain == retrain_of_paper(model)
    assert recipe.long_retrain == long_retrain_of_paper(model)


@pytest.mark.parametrize("model", SCRATCH)
def test_a_run_uses_the_papers_recipe(model: str) -> None:
    config = composed(f"model={model}", "dataset=imagenet", "mode=long_retrain", "weights=torchvision")
    wanted = long_retrain_of_paper(model)
    assert (config.epochs, config.batch_size, config.lr) == (wanted.epochs, wanted.batch_size, wanted.lr)


@pytest.mark.parametrize(
    "dataset", [name for name in DATASETS if name not in ("squad", "imagenet", "text", "text_scratch", "deit")]
)
def test_long_retraining_is_from_scratch_at_a_hundredth_of_the_learning_rate(dataset: str) -> None:
    recipe = composed(f"dataset={dataset}").recipe
    assert recipe.scratch is not None
    assert recipe.long_retrain == replace(recipe.scratch, lr=pytest.approx(recipe.scratch.lr * 0.01))


@pytest.mark.parametrize("stand_in", [name for name in STAND_INS if name not in ("short_squad", "small_text")])
def test_long_retraining_on_stand_ins_has_a_hundredth_of_the_learning_rate(stand_in: str) -> None:
    composed_ = compose_config(["+experiment=table4", f"+stand_in={stand_in}"])
    dataset = composed_.standins["imagenet"]
    recipe = composed("+experiment=table4", f"+stand_in={stand_in}", f"dataset={dataset}", "weights=baseline").recipe
    assert recipe.scratch is not None
    assert recipe.long_retrain == replace(recipe.scratch, lr=pytest.approx(recipe.scratch.lr * 0.01))


def test_sgd_uses_nesterov_momentum_if_the_recipe_says_so() -> None:
    stage = StageConfig(optimizer=Optimizer.sgd, momentum=0.9)
    for nesterov in (True, False):
        (group,) = make_optimizer(nn.Linear(2, 2), replace(stage, nesterov=nesterov), 0.1).param_groups
        assert group["nesterov"] is nesterov and group["momentum"] == 0.9


def test_the_recipe_of_bert_is_that_of_the_code_that_the_paper_used() -> None:
    """Section 6 gives batch size, lr and epochs; NVIDIA's run_squad.py gives the rest."""
    config = composed("dataset=squad", "model=bert_base")
    adam = {"optimizer": "adamw", "bias_correction": False, "weight_decay": 0.01, "max_grad_norm": 1.0}
    wanted = StageConfig(2, 4, 3e-5, schedule="linear", warmup_epochs=0.2, **adam)
    assert asdict(config.stage) == asdict(wanted)
    assert config.recipe.retrain == wanted
    assert (config.dataset.max_length, config.dataset.stride) == (384, 128)
