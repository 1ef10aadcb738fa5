"""LSQ and PACT against autograd of their definitions written out, and their rules."""

import math

import pytest
import torch
from torch import Tensor, nn

from qat_runner.config import StageConfig
from qat_runner.insertion import calibrate, quantize_model, quantized_tensors
from qat_runner.quant import DoReFaQuantizer, LearnedQuantizer, Quantizer
from qat_runner.quant.learned import lsq_start, pact_start
from qat_runner.training.recipe import make_optimizer


def ready(method: str, x: Tensor, **options: object) -> LearnedQuantizer:
    q = LearnedQuantizer(method, 4, **options)  # type: ignore[arg-type]
    with q.calibrating():
        q(x)
    return q


def rounded(v: Tensor) -> Tensor:
    return v + (v.round() - v).detach()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(), (6, 1)])
def test_lsq_against_its_definition(signed: bool, shape: tuple[int, ...]) -> None:
    x = torch.randn(6, 40)
    q = ready("lsq", x, signed=signed, shape=shape)
    lowest, highest = (-8, 7) if signed else (0, 15)
    a = x.abs() if signed else x.clamp(min=0)
    mean = a.mean() if shape == () else a.mean(1, keepdim=True)
    torch.testing.assert_close(q.learned.data, 2 * mean / math.sqrt(highest))

    upstream = torch.randn_like(x)
    mine = x.clone().requires_grad_()
    out = q(mine)
    out.backward(upstream)

    theirs, step = x.clone().requires_grad_(), q.learned.detach().clone().requires_grad_()
    count = x.numel() // step.numel()
    scale = 1 / math.sqrt(count * highest)
    scaled = step * scale + (step - step * scale).detach()  # the gradient scale, as its authors write it
    expected = rounded((theirs / scaled).clamp(lowest, highest)) * scaled
    expected.backward(upstream)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(q.learned.grad, step.grad, rtol=1e-4, atol=1e-6)


def test_lsq_counts_the_features_of_one_sample() -> None:
    x = torch.randn(8, 3, 5)
    grads = []
    for per_sample in (True, False):
        q = ready("lsq", x, per_sample=per_sample)
        q(x).sum().backward()
        grads.append(q.learned.grad)
    torch.testing.assert_close(grads[0], grads[1] * math.sqrt(8))


@pytest.mark.parametrize("signed", [True, False])
def test_pact_against_its_definition(signed: bool) -> None:
    x = torch.randn(500) * 3
    q = ready("pact", x, signed=signed, alpha=2.5)
    assert q.learned.item() == 2.5
    upstream = torch.randn_like(x)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    q(mine).backward(upstream)
    alpha = torch.tensor(2.5, requires_grad=True)
    low = -alpha if signed else torch.zeros(())
    clipped = torch.where(theirs >= alpha, alpha, torch.where(theirs <= low, low, theirs))
    clipped.backward(upstream)
    torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(q.learned.grad, alpha.grad)


def test_starts_refuse_and_default() -> None:
    assert pact_start(torch.randn(3), 4).item() == 10
    with pytest.raises(ValueError, match="alpha=-1"):
        LearnedQuantizer("pact", 4, alpha=-1)
    with pytest.raises(TypeError, match="has no option 'q'"):
        LearnedQuantizer("lsq", 4, q=99)
    with pytest.raises(ValueError, match="method='octav': must be one of lsq, pact"):
        LearnedQuantizer("octav", 4)
    assert lsq_start(torch.zeros(5), 4).item() == 0
    with pytest.raises(RuntimeError, match="no clipping scalars yet"):
        LearnedQuantizer("lsq", 4)(torch.randn(3))


def test_a_step_below_zero_does_no_harm() -> None:
    q = ready("lsq", torch.randn(50))
    q.learned.data.fill_(-0.1)
    assert q(torch.randn(50)).isfinite().all()


def test_evaluation_uses_what_was_learned_and_state_travels() -> None:
    x = torch.randn(100)
    q = ready("lsq", x)
    q.learned.data.mul_(1.5)
    trained = q(x).detach()
    q.eval()
    assert torch.equal(q(x), trained)
    torch.testing.assert_close(q.s, q.learned * 8)
    again = LearnedQuantizer("lsq", 4)
    again.load_state_dict(q.state_dict())
    assert torch.equal(again(x), trained)
    static = Quantizer(4, dynamic=False)
    with static.calibrating():
        static(x)
    again.load_state_dict(static.state_dict())
    torch.testing.assert_close(again.learned.data * 8, static.s)
    fresh = LearnedQuantizer("lsq", 4)
    fresh.load_state_dict({})  # a full-precision model's


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_a_network_learns_its_scalars(method: str) -> None:
    x = torch.randn(8, 3, 8, 8)
    model = quantize_model(network(), 3, method, example=x)
    calibrate(model, [x])
    optimizer = make_optimizer(model, StageConfig(weight_decay=0.1), lr=0.01)
    kinds = {t.name: type(t.quantizer) for t in quantized_tensors(model)}
    assert kinds["2.input"] is LearnedQuantizer
    assert kinds["2.weight"] is (LearnedQuantizer if method == "lsq" else DoReFaQuantizer)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    quantizer = next(t.quantizer for t in quantized_tensors(model) if t.name == "2.input")
    assert isinstance(quantizer, LearnedQuantizer)
    assert decay[id(quantizer.learned)] == (0.0 if method == "lsq" else 0.1)
    assert decay[id(model[2].weight)] == (0.05 if method == "lsq" else 0.1)  # half at 3 bits
    assert decay[id(model[0].weight)] == 0.1  # 8 bits
    before = quantizer.learned.item()
    model(x).square().sum().backward()
    optimizer.step()
    assert quantizer.learned.item() != before
    model(x)
    assert quantizer.last_s is not None and quantizer.s.item() == quantizer.last_s.item()
