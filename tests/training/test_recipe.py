from collections.abc import Sequence

import pytest
import torch
import torchvision
from torch import Tensor

from qat_runner.config import Spared, StageConfig
from qat_runner.training import recipe
from qat_runner.training.recipe import learning_rate, make_optimizer


def test_step_decay_is_exact() -> None:
    stage = StageConfig(epochs=90, batch_size=1, lr=0.1, schedule="step", decay_every=30, decay_factor=0.1)
    rates = [learning_rate(stage, 0.1, 90, epoch, step, 7) for epoch in range(90) for step in range(7)]
    assert rates[: 30 * 7] == [0.1] * 210
    assert rates[30 * 7] == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(0.001)


def test_cosine_and_warmup() -> None:
    stage = StageConfig(epochs=10, batch_size=1, lr=1.0, schedule="cosine", warmup_epochs=2)
    rates = [learning_rate(stage, 1.0, 10, epoch, step, 5) for epoch in range(10) for step in range(5)]
    assert rates[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert rates[10] == 1.0
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), T_max=40)
    expected = []
    for _ in range(40):
        expected.append(reference.get_last_lr()[0])
        reference.optimizer.step()
        reference.step()
    assert rates[10:] == pytest.approx(expected)


def test_linear_decay_after_a_part_of_an_epoch_of_warmup() -> None:
    stage = StageConfig(epochs=2, batch_size=1, lr=1.0, schedule="linear", warmup_epochs=0.2)
    rates = [learning_rate(stage, 1.0, 2, epoch, step, 10) for epoch in range(2) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, *(1 - k / 18 for k in range(18))])


def test_adamw_spares_biases_and_normalization_the_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    stage = StageConfig(epochs=1, batch_size=1, lr=1.0, optimizer="adamw", weight_decay=0.01)
    optimizer = make_optimizer(model, stage, 0.5)
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    assert [p.shape for p in decayed["params"]] == [(2, 2)]
    assert len(spared["params"]) == 3


class Attentive(torch.nn.Module):
    """A module with the parameters that vision transformers have besides layers."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = (torch.nn.Parameter(torch.zeros(1, n, 4)) for n in (1, 5))
        self.layer_scale = torch.nn.Parameter(torch.zeros(4, 1, 1))
        self.own = torch.nn.Parameter(torch.zeros(3, 4))
        self.layer = torch.nn.Linear(4, 1)

    def no_weight_decay(self) -> set[str]:
        return {"own"}


def test_adamw_spares_what_deit_does() -> None:
    model = torch.nn.Sequential(Attentive())

    def names(which: Spared) -> set[str]:
        found = recipe.without_decay(model, which)
        return {name for name, p in model.named_parameters() if p in found}

    assert names(Spared.vectors) == {"0.layer.bias"}
    tokens = {"0.cls_token", "0.pos_embed", "0.layer_scale", "0.own", "0.layer.bias"}
    assert names(Spared.tokens) == tokens


@pytest.mark.parametrize(
    ("network", "those"),
    [
        ("swin_t", {"relative_position_bias_table"}),
        ("vit_b_16", {"class_token", "pos_embedding"}),
        ("convnext_tiny", {"layer_scale"}),
    ],
)
def test_parameters_of_positions_by_their_names(network: str, those: set[str]) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(network, weights=None)
    found = recipe.without_decay(model, Spared.tokens)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p in found and p.ndim > 1} == those


def _uncorrected(start: Tensor, gradients: Sequence[Tensor], lr: float, decay: float) -> Tensor:
    """Reference: Adam with decoupled weight decay, no bias correction, in float64 (betas 0.9, 0.999, eps 1e-8)."""
    p, m, v = start.double(), 0.0, 0.0
    for g in (gradient.double() for gradient in gradients):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = p - lr * (m / (v.sqrt() + 1e-8) + decay * p)
    return p


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("saved_after", [None, 3])
def test_adamw_without_bias_correction(
    saved_after: int | None, fused: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after resuming from a checkpoint, and with the fused optimizer of a GPU."""
    monkeypatch.setattr(recipe, "fuses", lambda device: fused)
    layer = torch.nn.Linear(5, 4, bias=False)
    start = layer.weight.detach().clone()
    gradients = [torch.randn(4, 5) * 10.0**-i for i in range(8)]
    stage = StageConfig(1, 1, 1.0, optimizer="adamw", bias_correction=False, weight_decay=0.1)
    optimizer = make_optimizer(layer, stage, 0.01)
    for i, gradient in enumerate(gradients):
        if i == saved_after:
            saved = optimizer.state_dict()
            optimizer = make_optimizer(layer, stage, 0.01)
            optimizer.load_state_dict(saved)
        layer.weight.grad = gradient.clone()
        optimizer.step()
    expected = _uncorrected(start, gradients, 0.01, 0.1)
    torch.testing.assert_close(layer.weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
    first = (_uncorrected(start, gradients[:1], 0.01, 0.0) - start.double()).abs()
    assert first.max() == pytest.approx(0.01 * 0.1 / 0.001**0.5, rel=1e-4)  # 3.2 times a corrected first step


def test_it_is_fused_on_a_gpu_alone() -> None:
    """On a CPU, fused AdamW would give other last bits."""
    assert recipe.fuses(torch.device("cuda", 1)) is True
    assert recipe.fuses(torch.device("cpu")) is None


def test_optimizer() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = make_optimizer(model, StageConfig(epochs=1, batch_size=1, lr=1.0, weight_decay=3e-4, momentum=0.8), 0.5)
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 4
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.5, 0.8, 3e-4)
