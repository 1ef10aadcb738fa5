"""Tests of freezing after training, of noise reports, and that half precision keeps the scalars in float32."""

import pytest
import torch
from torch import Tensor, nn

from qat_runner.insertion import calibrate, freeze, noise_report, quantize_model, quantized_tensors
from qat_runner.insertion.modes import explaining_argument_errors
from qat_runner.quant import IntFormat, Octav, Quantizer, fake_quantize, maximum, octav, sqnr_db


def network(**options: object) -> nn.Module:
    layers = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()),
        nn.Linear(128, 7),
    )
    return quantize_model(layers, bits=4, example=torch.randn(2, 3, 8, 8), **options)  # type: ignore[arg-type]


def batches(count: int = 3) -> list[Tensor]:
    return [torch.randn(4, 3, 8, 8) * (1 + i) for i in range(count)]


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    return {t.name: t.quantizer for t in quantized_tensors(model)}


def train(model: nn.Module, data: list[Tensor]) -> None:
    model.train()
    for x in data:
        model(x)


def test_noise_of_every_tensor() -> None:
    model, data = network(), [torch.randn(6, 3, 8, 8)]
    inputs: dict[str, Tensor] = {}
    model[3].register_forward_pre_hook(lambda m, a: inputs.update(x=a[0].clone()))
    rows = {(r.layer, r.tensor): r for r in noise_report(model, data)}
    assert len(rows) == 6
    row, x = rows["3", "input"], inputs["x"]
    s = octav(x, IntFormat(4, False))
    assert (row.bits, row.signed, row.granularity) == (4, False, "tensor")
    assert row.s == pytest.approx(s.item())
    assert row.sqnr_db == pytest.approx(sqnr_db(x, fake_quantize(x, s, IntFormat(4, False))).item())
    assert row.max_sqnr_db == pytest.approx(
        sqnr_db(x, fake_quantize(x, maximum(x, IntFormat(4, False)), IntFormat(4, False))).item()
    )
    w = model[3].weight
    assert rows["3", "weight"].s == pytest.approx(octav(w, 4, dim=0).mean().item())
    assert rows["3", "weight"].granularity == "channel"
    assert noise_report(model, []) == []
    with pytest.raises(ValueError, match="Sequential has no quantizers"):
        noise_report(nn.Sequential(nn.Linear(2, 2)), [torch.randn(2, 2)])


def test_noise_report_is_a_table_and_leaves_the_mode_alone() -> None:
    model = network().train()
    model[1].eval()
    text = str(noise_report(model, [(torch.randn(2, 3, 8, 8),)]))
    assert [m.training for m in model][:3] == [True, False, True]
    assert len(text.splitlines()) == 8 and "max_sqnr_db" in text


def test_averaged_scalars_are_those_of_the_quantized_network() -> None:
    model, data = network(), batches()
    train(model, data)
    seen: list[Tensor] = []
    quantizers(model)["3.input"].register_forward_hook(lambda q, a, o: seen.append(octav(a[0], IntFormat(4, False))))
    model.eval()
    for x in data:
        model(x)
    mean = torch.stack(seen).mean(0)
    model.train()
    assert freeze(model, "averaged", data) is model
    found = quantizers(model)
    assert model.training and not any(q.dynamic for q in found.values())
    torch.testing.assert_close(found["3.input"].s, mean)
    torch.testing.assert_close(found["3.weight"].s, octav(model[3].weight, 4, dim=0))


def test_calibrated_scalars_are_those_of_static_octav() -> None:
    model, static, data = network(), network(dynamic=False), batches()
    train(model, data)
    static.load_state_dict({k: v for k, v in model.state_dict().items() if "quantizer" not in k}, strict=False)
    calibrate(static, data)
    freeze(model, "calibrated", [(x,) for x in data])
    for name, q in quantizers(static).items():
        torch.testing.assert_close(quantizers(model)[name].s, q.s)
    x = data[0]
    torch.testing.assert_close(model.eval()(x), static.eval()(x))


def test_running_scalars_are_those_of_training() -> None:
    model = network()
    train(model, batches(5))
    running = {name: q.running_s.clone() for name, q in quantizers(model).items() if "input" in name}
    freeze(model, "running")
    for name, s in running.items():
        assert torch.equal(quantizers(model)[name].s, s)


def test_a_frozen_network_gives_each_sample_the_same_whatever_its_batch() -> None:
    model, data = network(), batches()
    train(model, data)
    freeze(model, "averaged", data).eval()
    x = torch.cat(data)
    torch.testing.assert_close(model(x)[:4], model(x[:4]))


def test_static_and_learned_scalars_stay() -> None:
    data = batches()
    for options in ({"dynamic": False}, {"clipping": "lsq"}, {"clipping": "pact"}):
        model = network(**options)
        calibrate(model, data)
        model.eval()
        before = model(data[0])
        s = {name: q.s.clone() for name, q in quantizers(model).items() if not q.dynamic}
        for rule in ("averaged", "calibrated"):
            freeze(model, rule, data)
        assert s and all(torch.equal(quantizers(model)[name].s, value) for name, value in s.items())
        torch.testing.assert_close(model(data[0]), before)


def test_what_cannot_be_frozen() -> None:
    model = network()
    with pytest.raises(ValueError, match="rule='mean': must be one of averaged, calibrated, running"):
        freeze(model, "mean")
    with pytest.raises(ValueError, match=r"0\.input, 3\.input, 6\.input has not been trained"):
        freeze(model, "running")
    untraced = quantize_model(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), 4)
    with pytest.raises(ValueError, match=r"0\.input, 1\.input has not been trained.*; use 'averaged' with batches"):
        freeze(untraced, "running")
    assert all(q.dynamic for q in quantizers(untraced).values())
    with pytest.raises(ValueError, match="at least one batch"):
        freeze(model, "averaged")
    with pytest.raises(ValueError, match="finite and not negative"):
        Quantizer(4, Octav()).freeze(torch.tensor(torch.nan))
    labelled = [(batch, torch.zeros(len(batch))) for batch in batches()]
    for look in (freeze, calibrate, noise_report):
        with pytest.raises(TypeError, match=r"takes 1 argument \(input\): too many .* be the input alone") as caught:
            look(model, batches=labelled)
        assert isinstance(caught.value.__cause__, TypeError)
    with pytest.raises(TypeError, match="a batch must be the input alone"):
        quantize_model(nn.Sequential(nn.Linear(4, 3)), example=(torch.randn(2, 4), torch.zeros(2)))
    with pytest.raises(TypeError, match=r"^its own$"), explaining_argument_errors(model, batches(1)):
        raise TypeError("its own")
    assert all(q.dynamic for q in quantizers(model).values())
    freeze(model, "averaged", batches())  # it can still be frozen afterwards


def test_half_precision_keeps_scalars_in_full() -> None:
    model = network().to(torch.bfloat16)
    freeze(model, "averaged", [x.bfloat16() for x in batches()])
    assert all(q.s.dtype == torch.float32 for q in quantizers(model).values())
