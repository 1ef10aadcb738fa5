"""Affine integers, with two clipping bounds and a zero point: from the definition to exported files."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qat_runner.exporting.folding import fold_batchnorm
from qat_runner.exporting.formats import (
    Signature,
    read_program,
    read_safetensors,
    write_onnx,
    write_program,
    write_safetensors,
)
from qat_runner.exporting.integer import to_integers
from qat_runner.exporting.verify import OnnxFile
from qat_runner.insertion import calibrate, freeze, load, noise_report, quantize_model, quantized_tensors, save, summary
from qat_runner.quant import (
    IntAffineFormat,
    IntFormat,
    Octav,
    Quantizer,
    Range,
    clipping_method,
    expected_mse,
    fake_quantize,
    maximum,
    measure,
    mse_sweep,
    octav,
    oriented,
    percentile,
)
from qat_runner.quant.kernels import using
from qat_runner.quant.pool import Pool
from qat_runner.training.histograms import histograms
from tests.quant.oracles import same_but_for_ties
from tests.quant.test_kernels import DEVICES, DTYPES, GPU, names, on


def lopsided(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.hardswish(2 * torch.randn(*shape, generator=generator))


def by_hand(x: Tensor, low: float, high: float, bits: int) -> Tensor:
    """Quantize with PyTorch's own per-tensor affine quantization, in float32."""
    last = 2**bits - 1
    scale = torch.tensor(high - low, dtype=torch.float32) / last
    zero = int((-torch.tensor(low, dtype=torch.float32) / scale).round().clamp(0, last))
    return torch.fake_quantize_per_tensor_affine(x, float(scale), zero, 0, last)


@names
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_are_pytorchs(name: str, dtype: torch.dtype, bits: int) -> None:
    x = (torch.randn(6, 500) * 2).to(dtype)
    for low, high in ((-0.4, 3.0), (0.0, 2.0), (-3.0, 0.0), (-1.0, 1.0)):
        with using(name, DEVICES[name]):
            found = fake_quantize(on(name, x), torch.tensor([low, high]), IntAffineFormat(bits)).cpu()
        assert found.dtype == dtype
        step = (high - low) / (2**bits - 1)
        expected = by_hand(x.float(), low, high, bits)
        near = (found.float() - expected).abs() <= 0.01 * step + torch.finfo(dtype).eps * x.float().abs()
        assert near.float().mean() > 0.995  # ties and values next to a tie may round either way
        assert (found.float() - expected).abs().max() <= step * 1.01 + 0.02


@given(
    st.lists(st.floats(-100, 100, width=16), min_size=1, max_size=20),
    st.floats(-50, 0),
    st.floats(0, 50),
    st.integers(2, 8),
)
def test_zero_is_exact_and_codes_come_back(values: list[float], low: float, high: float, bits: int) -> None:
    format, s = IntAffineFormat(bits), torch.tensor([low, high])
    x = torch.tensor([*values, 0.0])
    q = fake_quantize(x, s, format)
    assert q[-1] == 0
    codes = format.encode(x, s)
    assert torch.equal(codes, codes.round()) and codes.min() >= 0 and codes.max() <= 2**bits - 1
    torch.testing.assert_close(format.decode(codes, s), q)
    assert codes[-1] == format.zero_point(s)
    assert len(q.unique()) <= 2**bits
    step = float(format.step(s))
    inside = (x >= low) & (x <= high)
    assert ((q - x).abs()[inside] <= step * (1 + 1e-4) + 1e-6).all()  # half a step each from x and z


@names
@pytest.mark.parametrize("gradient", ["ste", "pwl", "mad"])
def test_gradients(name: str, gradient: str) -> None:
    x, s = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0, 4.0]), torch.tensor([-0.5, 3.0])
    leaf = on(name, x.clone()).requires_grad_()
    with using(name, DEVICES[name]):
        fake_quantize(leaf, on(name, s), IntAffineFormat(4), gradient).sum().backward()
    expected = {"ste": [1.0] * 6, "pwl": [0.0, 1, 1, 1, 1, 0], "mad": [0.25, 1, 1, 1, 1, 0.75]}[gradient]
    assert leaf.grad is not None and leaf.grad.cpu().tolist() == pytest.approx(expected)


@names
def test_rows_have_intervals_of_their_own(name: str) -> None:
    x = torch.randn(3, 4, 5, 2)
    s = torch.stack([-torch.rand(3, 1, 1, 1), torch.rand(3, 1, 1, 1)])
    format = IntAffineFormat(3)
    leaf = on(name, x.clone()).requires_grad_()
    with using(name, DEVICES[name]):
        found = fake_quantize(leaf, on(name, s), format)
        found.sum().backward()
    for i in range(3):
        row = x[i].clone().requires_grad_()
        expected = fake_quantize(row, s[:, i, 0, 0, 0], format)
        expected.sum().backward()
        assert torch.equal(found[i].detach().cpu(), expected.detach())
        torch.testing.assert_close(leaf.grad[i].cpu(), row.grad)  # type: ignore[index]


def test_what_are_no_ends() -> None:
    with pytest.raises(ValueError, match="must have a first dimension of 2 for int_affine"):
        fake_quantize(torch.randn(3), 1.0, IntAffineFormat(4))
    with pytest.raises(ValueError, match="does not broadcast"):
        fake_quantize(torch.randn(3), torch.zeros(2, 4), IntAffineFormat(4))
    q = Quantizer(IntAffineFormat(4), Octav())
    for ends in ((0.1, 1.0), (-1.0, -0.1), (-math.inf, 1.0)):
        with pytest.raises(ValueError, match="bounds must be finite, the lower one at most 0"):
            q.assign(torch.tensor(ends))
    with pytest.raises(ValueError, match="range=oriented: is for plain integers, not for int_affine4"):
        quantize_model(nn.Sequential(nn.Linear(3, 3)), 4, format="int_affine", range="oriented", first_last_bits=None)
    with pytest.raises(ValueError, match="clipping 'pact' is for plain integers"):
        clipping_method("pact").quantizer(IntAffineFormat(4), weight=False)


@pytest.mark.parametrize("dim", [None, 0])
def test_extremes_and_percentiles(dim: int | None) -> None:
    x = lopsided(4, 1000)
    rows = [x.flatten()] if dim is None else list(x)
    for q in (100.0, 99.0, 60.0):
        s = percentile(x, IntAffineFormat(4), dim, q)
        assert s.shape == ((2,) if dim is None else (2, 4, 1))
        expected = [
            [min(torch.quantile(r, 1 - q / 100).item(), 0), max(torch.quantile(r, q / 100).item(), 0)] for r in rows
        ]
        torch.testing.assert_close(s.reshape(2, -1).T, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert torch.equal(maximum(x, IntAffineFormat(4), dim), percentile(x, IntAffineFormat(4), dim, 100))
    assert (octav(x.abs(), IntAffineFormat(4, False), dim)[0] == 0).all()


def brute_force(x: Tensor, format: IntAffineFormat, shares: int = 40) -> Tensor:
    """Return the least measured error of each row of [rows, n] over a grid of both bounds: [rows, 1]."""
    top, best = maximum(x, format, 0), torch.full((len(x), 1), math.inf, dtype=x.dtype)
    for low in torch.linspace(0.02, 1, shares).tolist():
        for high in torch.linspace(0.02, 1, shares).tolist():
            s = torch.stack([low * top[0], high * top[1]])
            best = torch.minimum(best, (fake_quantize(x, s, format) - x).square().sum(1, keepdim=True))
    return best


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_methods_beside_brute_force(bits: int) -> None:
    """On long rows of any distribution, OCTAV is within a few percent of the optimum, the sweep within one percent."""
    format = IntAffineFormat(bits)
    shapes = {
        "normal": torch.randn(8, 3000),
        "hard-swish": lopsided(8, 3000),
        "exponential": torch.randn(8, 3000).exp() - 1,
    }
    for x in shapes.values():
        x = x.double()
        least = brute_force(x, format).sum()

        def excess(s: Tensor, x: Tensor = x, least: Tensor = least) -> float:
            return ((fake_quantize(x, s, format) - x).square().sum() / least).item() - 1

        assert excess(octav(x, format, 0)) < 0.1
        assert excess(mse_sweep(x, format, 0, 50, together=False)) < 0.02
        assert bits == 8 or excess(octav(x, format, 0)) <= excess(maximum(x, format, 0))


@names
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_octav_is_never_worse_than_its_model_says_of_the_extremes(name: str, bits: int) -> None:
    """On short rows the search may end before it has converged, after ten reads or after six from a start."""
    format, rows = IntAffineFormat(bits), 200 if name != "triton" or GPU else 40
    for n in (1, 2, 9, 64):
        drawn = torch.randn(rows, n), torch.randn(rows, n).abs(), lopsided(rows, n)
        for x in (*drawn, torch.ones(3, n), -torch.ones(3, n), torch.zeros(2, n)):
            top = maximum(x, format, 0)
            with using(name, DEVICES[name]):
                cold = octav(on(name, x), format, 0)
                start = cold * (1 + 0.02 * torch.randn_like(cold))
                warm = octav(on(name, x), format, 0, iterations=6, tolerance=1e-4, init=start)
            for s in (cold.cpu(), warm.cpu()):
                assert (s[0] <= 0).all() and (s[1] >= 0).all() and torch.isfinite(s).all()
                ours, extremes = (expected_mse(x, t, format, 0) for t in (s, top))
                assert (ours <= extremes * 1.001 + 1e-12).all()


@pytest.mark.parametrize("exponent", [-90, 90])
def test_the_sweep_does_not_depend_on_the_scale(exponent: int) -> None:
    """Squares of such values vanish or overflow in float32."""
    x, format = lopsided(6, 50) * torch.logspace(-1, 1, 6)[:, None], IntAffineFormat(4)
    for together in (True, False):
        expected = mse_sweep(x, format, 0, 20, together=together)
        found = mse_sweep(x * 2.0**exponent, format, 0, 20, together=together)
        assert torch.equal(found, expected * 2.0**exponent)
    assert (expected[1] < x.amax(1, keepdim=True)).any()


@names
@pytest.mark.parametrize("dtype", DTYPES)
def test_octav_of_backends_cold_and_warm(name: str, dtype: torch.dtype) -> None:
    for shape, dim in (((6, 4000), 0), ((2, 3, 50, 40), None)):
        x, format = lopsided(*shape).to(dtype), IntAffineFormat(4)
        reference = octav(x.double(), format, dim, 30)
        least = expected_mse(x, reference, format, dim)
        with using(name, DEVICES[name]):
            cold = octav(on(name, x), format, dim, 20).cpu()
            warm = octav(on(name, x), format, dim, 6, on(name, 1.2 * reference.float())).cpu()
        for found in (cold, warm):
            assert found.dtype == torch.float32
            assert (expected_mse(x, found, format, dim) <= least * 1.05).all()  # J is flat near the minimum


@names
@pytest.mark.parametrize("n", [2000, 20_000])
def test_octav_beside_one_massive_element(name: str, n: int) -> None:
    """Ten reads suffice although the mean is far below; from a warm start with a bound at zero, two reads suffice."""
    format = IntAffineFormat(8)
    x = torch.randn(1, n)
    x[0, 0] = 1e5
    least = expected_mse(x, octav(x.double(), format, 0, 40), format, 0)
    with using(name, DEVICES[name]):
        found = octav(on(name, x), format, 0).cpu()
    assert (expected_mse(x, found, format, 0) <= least * 1.3).all()
    x = torch.randn(1, n).relu()
    best = octav(x.double(), format, 0, 40)
    with using(name, DEVICES[name]):
        found = octav(on(name, x), format, 0, 2, on(name, 1.1 * best.float())).cpu()
    assert (expected_mse(x, found, format, 0) <= expected_mse(x, best, format, 0) * 1.05).all()


@names
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from NumPy, which Triton's interpreter uses
def test_octav_of_what_is_not_finite(name: str, bad: float) -> None:
    """Neither bound is found, so the running averages of both keep their values."""
    x = torch.randn(2, 3000)
    x[0, 5:7] = torch.tensor([bad, -50.0])
    q = Quantizer(IntAffineFormat(4), Octav()).train().to(DEVICES[name])
    with using(name, DEVICES[name]):
        for guess in (None, on(name, torch.tensor([-2.0, 2.0]).reshape(2, 1, 1).expand(2, 2, 1))):
            found = octav(on(name, x), q.format, 0, init=guess, check=False).cpu()
            assert found[:, 0].isnan().all() and found[:, 1].isfinite().all()
        q(on(name, x[1]))
        before = q.running_s.clone()
        q(on(name, x[0]))
    assert torch.equal(q.running_s, before)


@names
@pytest.mark.parametrize("start", [(-1e-30, 1e-30), (-1e30, 1e30), (-1.0, 0.0), (0.0, 1.0), (math.nan, 1.0)])
def test_octav_from_a_start_that_tells_nothing(name: str, start: tuple[float, float]) -> None:
    x, format = lopsided(3, 4000), IntAffineFormat(4)
    least = expected_mse(x, octav(x.double(), format, 0, 30), format, 0)
    with using(name, DEVICES[name]):
        guess = torch.tensor(start)[:, None, None].expand(2, 3, 1)
        found = octav(on(name, x), format, 0, 40, on(name, guess)).cpu()
    assert (expected_mse(x, found, format, 0) <= least * 1.05).all()


@names
def test_octav_without_a_lower_end_is_octav_in_one_unknown(name: str) -> None:
    x = lopsided(5, 300).relu()
    plain = IntFormat(4, signed=False, range=Range.FULL)  # has the same levels
    with using(name, DEVICES[name]):
        for start in (None, torch.full((5, 1), 1.5)):
            both = None if start is None else on(name, torch.stack([torch.zeros_like(start), start]))
            low, high = octav(on(name, x), IntAffineFormat(4, signed=False), 0, init=both).cpu()
            s = octav(on(name, x), plain, 0, init=None if start is None else on(name, start))
            assert not low.any() and torch.equal(high, s.cpu())


class Halves(Pool):
    """A pool that acts as if another process had the same tensor."""

    def total(self, *figures: Tensor) -> list[Tensor]:
        return [2 * f.double() for f in figures]

    def largest(self, figure: Tensor) -> Tensor:
        return figure


def test_pooled_with_its_like_nothing_changes() -> None:
    x, format = lopsided(1000), IntAffineFormat(4)
    torch.testing.assert_close(octav(x, format, pool=Halves()), octav(x, format), rtol=1e-4, atol=1e-5)
    assert torch.equal(maximum(x, format, pool=Halves()), maximum(x, format))


def test_lopsided_activations_gain() -> None:
    x = lopsided(20000)
    affine, plain = IntAffineFormat(4), IntFormat(4, range=Range.FULL)
    gain = measure(x, octav(x, affine), affine).sqnr_db - measure(x, octav(x, plain), plain).sqnr_db
    assert gain > 4
    assert measure(x, octav(x, affine), affine).clipped_fraction < 0.2  # many values are close to the lower bound


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.b, self.head = nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.norm(self.a(x)))
        out: Tensor = self.head(nn.functional.hardswish(self.b(x)).mean((2, 3)))
        return out


def trained(bits: int = 4, method: str = "octav", **how: object) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(8, 3, 10, 10)
    with torch.no_grad():
        model.norm.weight[:3] = -0.8
    quantize_model(model, bits, method, format="int_affine", example=x, **how)  # type: ignore[arg-type]
    calibrate(model, [x])
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model, x


@pytest.mark.parametrize("method", ["octav", "max", "percentile", "mse_sweep", "lsq"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_every_method_trains(method: str, dynamic: bool) -> None:
    model, x = trained(4, method, dynamic=dynamic)
    report = noise_report(model, [x])
    assert all(row.s > 0 and math.isfinite(row.mse) and row.sqnr_db > 3 for row in report)
    signs = {t.name: t.quantizer.format.signed for t in quantized_tensors(model)}
    assert signs["b.input"] and "affine" in summary(model)
    freeze(model, "averaged", [x])
    assert all((t.quantizer.s[0] <= 0).all() and (t.quantizer.s[1] >= 0).all() for t in quantized_tensors(model))
    assert torch.isfinite(model.eval()(x)).all()


def test_weights_and_activations_have_formats_of_their_own() -> None:
    for how in (
        {"activation_format": "int_affine", "weight_range": "oriented"},
        {"format": "int_affine", "weight_format": "int"},
    ):
        model = quantize_model(Net(), 4, example=torch.randn(2, 3, 10, 10), **how)  # type: ignore[arg-type]
        kinds = {(t.tensor, type(t.quantizer.format)) for t in quantized_tensors(model)}
        assert kinds == {("weight", IntFormat), ("input", IntAffineFormat)}


def test_histograms_know_both_ends() -> None:
    model, x = trained(3, weight_format="int")
    found = {f"{h['layer']}.{h['tensor']}": h for h in histograms(model, [(x,)])}
    of_input = found["b.input"]
    low, high = of_input["ends"]
    assert low < 0 and max(-low, high) == pytest.approx(1) and len(of_input["levels"]) == 8
    assert low - 0.2 < of_input["levels"][0] < 0 and 0.0 in of_input["levels"]
    assert "ends" not in found["b.weight"] and of_input["s"] > 0


def test_lsq_plus_is_its_definition() -> None:
    """Compare with autograd of the published equations, with straight-through rounding."""
    format = IntAffineFormat(3)
    method = clipping_method("lsq")
    quantizer = method.quantizer(format, weight=False)
    quantizer.assign(torch.tensor([-0.8, 2.0]))
    x = (torch.randn(4, 50) * 2).requires_grad_()
    grad = torch.randn(4, 50)
    quantizer(x).backward(grad)

    step, low = (t.clone().requires_grad_() for t in (torch.tensor(0.4), torch.tensor(-0.8)))
    y = x.detach().clone().requires_grad_()
    v = ((y - low) / step).clamp(0, 7)
    zero = (-low.detach() / step.detach()).round()
    code = (y.detach() / step.detach()).round().clamp(-zero, 7 - zero) + zero
    published = (v + (code - v).detach()) * step + low  # the lower bound is a multiple of the step: not rounded
    published.backward(grad)
    scale = 1 / math.sqrt(50 * 7)
    torch.testing.assert_close(quantizer.learned.grad[0], step.grad * scale, rtol=1e-4, atol=1e-5)  # type: ignore[index]
    torch.testing.assert_close(quantizer.learned.grad[1], low.grad * scale, rtol=1e-4, atol=1e-5)  # type: ignore[index]


def test_saved_and_made_again(tmp_path: Path) -> None:
    model, x = trained(4, weight_format="int")
    freeze(model, "averaged", [x]).eval()
    save(model, tmp_path / "net.pt")
    assert torch.equal(load(tmp_path / "net.pt", Net()).eval()(x), model(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        Quantizer(4, Octav()).load_state_dict(Quantizer(IntAffineFormat(4), Octav()).state_dict())


@pytest.mark.parametrize("bits", [3, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("weights", ["int", "int_affine"])
def test_exported_with_zero_points(bits: int, weights: str, tmp_path: Path) -> None:
    model, x = trained(bits, weight_format=weights, first_last_bits=None)
    freeze(model, "averaged", [x]).eval()
    expected = model(x)
    integers = to_integers(model)
    assert torch.equal(integers(x), expected)
    assert integers.b.input_grid.zero_point > 0
    left = fold_batchnorm(integers, x)
    assert left == [] or (weights == "int" and bits < 8)
    folded = integers(x)
    same_but_for_ties(folded, expected)

    signature = Signature((x,), ["x"], ["y"])
    write_program(integers, signature, tmp_path / "m.pt2")
    torch.testing.assert_close(read_program(tmp_path / "m.pt2")(x)[0], folded)
    write_safetensors(integers, tmp_path / "m.safetensors", {})
    state = read_safetensors(tmp_path / "m.safetensors")
    assert all(torch.equal(state[name], t) for name, t in integers.state_dict().items())
    about = json.loads((tmp_path / "m.json").read_text())
    assert about["layers"]["b"]["input"]["zero_point"] == "b.input_grid.zero_point"
    assert about["value"].startswith("(code - zero_point) * scale")
    write_onnx(integers, signature, tmp_path / "m.onnx")
    found = OnnxFile(tmp_path / "m.onnx", fused=False)([x])
    same_but_for_ties(found, folded)


class Counting(Halves):
    """A pool that counts its calls; all parts must make the same number of calls."""

    asked = 0

    def total(self, *figures: Tensor) -> list[Tensor]:
        self.asked += len(figures)
        return [f.double() + 1 for f in figures]

    def largest(self, figure: Tensor) -> Tensor:
        self.asked += 1
        return figure.clamp(min=1)


@pytest.mark.parametrize(
    "format", [IntFormat(4), IntFormat(4, False), IntFormat(4, range=Range.ORIENTED), IntAffineFormat(4)]
)
def test_an_empty_part_asks_as_often_as_the_others(format: IntFormat | IntAffineFormat) -> None:
    """Processes wait for each other: if one makes fewer calls, the others wait forever."""
    asked = []
    for x in (torch.randn(0, 3), torch.randn(5, 3)):
        pool = Counting()
        s = octav(x, format, iterations=1, pool=pool)
        assert s.isfinite().all()
        maximum(x, format, pool=pool)
        if isinstance(format, IntFormat) and format.oriented:
            oriented(x, s, format, pool=pool)
        asked.append(pool.asked)
    assert asked[0] == asked[1] > 2


def test_what_is_measured_on_a_part_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="refine=8: must be 0 with a pool"):
        octav(torch.randn(9), 4, refine=8, pool=Halves())
