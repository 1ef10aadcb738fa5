import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from qat_runner.insertion import calibrate, quantize_model
from qat_runner.quant import Octav, Quantizer
from qat_runner.quant.recompute import recomputing


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    )


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gradient", ["ste", "mph"])
def test_gradients_are_the_same(layout: torch.memory_format, gradient: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 3, 8, 8).to(memory_format=layout)
    model = quantize_model(network().to(memory_format=layout), 4, gradient=gradient, example=x, warm_iterations=None)
    recomputed = gradients(model, x)
    monkeypatch.setattr("qat_runner.insertion.layers.recomputing", lambda *operands: saved_tensors_hooks(id_, id_))
    kept = gradients(model, x)
    assert len(kept) == 6
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_a_backward_pass_that_alone_is_recorded() -> None:
    """Operators give a transposed tensor, such as patches, other strides than the kernel of the forward pass did."""
    x = torch.randn(2, 6, 7).transpose(1, 2)
    model = quantize_model(nn.Sequential(nn.Linear(6, 4)), 4, first_last_bits=None, example=x, warm_iterations=None)
    expected = gradients(model, x)
    model.zero_grad()
    loss = model(x).square().sum()
    with FlopCounterMode(display=False):
        loss.backward()
    torch.testing.assert_close(model[0].weight.grad, expected[0])


@pytest.mark.parametrize("clipping", ["lsq", "pact"])
def test_gradients_of_learned_scalars_are_the_same(clipping: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 3, 8, 8)
    model = quantize_model(network(), 3, clipping, example=x)
    calibrate(model, [x])
    recomputed = gradients(model, x)
    monkeypatch.setattr("qat_runner.insertion.layers.recomputing", lambda *operands: saved_tensors_hooks(id_, id_))
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, x), recomputed, strict=True))


def id_(t: Tensor) -> Tensor:
    return t


def test_sequences_through_a_linear_layer() -> None:
    x = torch.randn(2, 7, 6)
    model = quantize_model(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), 4, example=x)
    assert len(gradients(model, x)) == 4


def test_quantized_tensors_are_not_kept() -> None:
    x, quantizer = torch.randn(50, 4, requires_grad=True), Quantizer(4, Octav())
    weight = torch.randn(3, 4, requires_grad=True)
    q = quantizer(x)
    saved: list[object] = []
    with saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, id_), recomputing((q, x, quantizer)):
        out = nn.functional.linear(q, weight)
    assert q.data_ptr() not in saved
    out.sum().backward()
    torch.testing.assert_close(weight.grad, q.detach().sum(0).expand(3, 4))


def test_a_changed_input_is_noticed() -> None:
    x, quantizer = torch.randn(50, 4), Quantizer(4, Octav(), gradient="ste")
    weight = torch.randn(3, 4, requires_grad=True)
    q = quantizer(x.requires_grad_())
    with recomputing((q, x, quantizer)):
        out = nn.functional.linear(q, weight)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match=r"of shape \[50, 4\], was changed in place after its use"):
        out.sum().backward()


def test_nothing_to_do_without_gradients() -> None:
    x, quantizer = torch.randn(5), Quantizer(4, Octav())
    with torch.no_grad():
        q = quantizer(x)
        assert not isinstance(recomputing((q, x, quantizer)), saved_tensors_hooks)
    assert not isinstance(recomputing((x, x, nn.Identity())), saved_tensors_hooks)
