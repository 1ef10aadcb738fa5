"""Ranges of the plain integers: the side of the extra code, OCTAV with a missing code, and the stability of signs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qat_runner.insertion import calibrate, freeze, load, noise_report, quantize_model, quantized_tensors, save
from qat_runner.quant import (
    METHODS,
    IntFormat,
    Octav,
    Quantizer,
    Range,
    clipping_method,
    expected_mse,
    fake_quantize,
    maximum,
    mse_sweep,
    octav,
    oriented,
)
from qat_runner.quant.kernels import using
from tests.quant.test_kernels import DEVICES, DTYPES, names, needs_compiler, on

ORIENTED = IntFormat(4, range=Range.ORIENTED)


def error(x: Tensor, s: Tensor, format: IntFormat) -> Tensor:
    """Return the squared error of each row of [rows, n], in float64: [rows, 1]."""
    return (fake_quantize(x.double(), s.double(), format) - x.double()).square().sum(1, keepdim=True)


def rows(n: int, count: int = 300, seed: int = 0) -> Tensor:
    """Return [count, n], float64: equal numbers of normal, skewed and heavy-tailed rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, n, generator=generator, dtype=torch.float64)
    x[count // 3 : 2 * count // 3].exp_()
    x[2 * count // 3 :] **= 3
    return x


def least_error(x: Tensor, format: IntFormat) -> Tensor:
    """Return the least error of each row over 1,500 scalars, of both signs if the format has them: [rows, 1]."""
    top, best = x.abs().amax(1, keepdim=True), torch.full((len(x), 1), math.inf, dtype=torch.float64)
    for factor in torch.linspace(0.05, 1.3, 1500).tolist():
        for sign in (1, -1) if format.oriented else (1,):
            best = torch.minimum(best, error(x, sign * factor * top, format))
    return best


def test_a_word_names_a_range() -> None:
    assert IntFormat(4, range="oriented") == ORIENTED  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not a valid Range"):
        IntFormat(4, range="ful")  # type: ignore[arg-type]


def test_the_end_that_serves_is_where_s_points() -> None:
    x = torch.tensor([-1.0, -0.9, 0.9, 1.0])
    assert fake_quantize(x, 1.0, ORIENTED).tolist() == [-1, -0.875, 0.875, 0.875]
    assert fake_quantize(x, -1.0, ORIENTED).tolist() == [-0.875, -0.875, 0.875, 1]
    assert fake_quantize(x, 1.0, IntFormat(4, range=Range.FULL)).tolist() == pytest.approx([-1, -6 / 7, 6 / 7, 1])
    assert fake_quantize(x, 1.0, 4).tolist() == [-1, -0.875, 0.875, 0.875]
    unsigned = ORIENTED.with_sign(False)
    assert not unsigned.oriented and unsigned.levels == IntFormat(4, False, Range.FULL).levels


@names
@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_scalars_mirror(name: str, dtype: torch.dtype) -> None:
    x = (torch.randn(6, 40) * 2).to(dtype)
    s = torch.rand(6, 1) + 0.5
    with using(name, DEVICES[name]):
        mirrored = -fake_quantize(on(name, -x), on(name, s), ORIENTED)
        assert torch.equal(fake_quantize(on(name, x), on(name, -s), ORIENTED), mirrored)
        for gradient in ("ste", "pwl", "mad"):
            inputs = [on(name, x).requires_grad_() for _ in range(2)]
            for leaf, sign in zip(inputs, (1, -1), strict=True):
                fake_quantize(leaf, sign * on(name, s), ORIENTED, gradient).float().sum().backward()
            assert torch.equal(*[leaf.grad for leaf in inputs])  # type: ignore[arg-type]


@given(
    st.lists(st.lists(st.floats(-8, 8, width=16), min_size=7, max_size=7), min_size=1, max_size=4),
    st.integers(2, 8),
    st.floats(0.125, 4),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_the_sign_is_that_of_the_smaller_error(
    values: list[list[float]], bits: int, s: float, dtype: torch.dtype
) -> None:
    x, format = torch.tensor(values, dtype=dtype), IntFormat(bits, range=Range.ORIENTED)
    scalars = torch.full((len(x), 1), s, dtype=torch.promote_types(dtype, torch.float32))
    sign = oriented(x, scalars, format).sign()
    assert sign.abs().eq(1).all()
    chosen, other = error(x, sign * scalars, format), error(x, -sign * scalars, format)
    assert (chosen <= other * (1 + 1e-5) + 1e-9).all()


@names
@pytest.mark.parametrize("dtype", DTYPES)
def test_signs_are_the_same_everywhere(name: str, dtype: torch.dtype) -> None:
    for shape, s in (((6, 5000), torch.rand(6, 1)), ((3, 4, 5, 2), torch.tensor(0.7)), ((2, 9), torch.zeros(2, 1))):
        x = torch.randn(shape).to(dtype)
        wide, ends = x.double(), s.double() * (1 - 2**-4)
        overhang = (wide - torch.minimum(torch.maximum(wide, -ends), ends)).sum_to_size(s.shape)
        large = 0.1 * s / 8 / 24 * x.numel() / s.numel()
        for before in (None, torch.ones_like(s), -0.3 * torch.ones_like(s)):
            sign = torch.ones_like(s) if before is None else before.sign()
            expected = torch.where(overhang * sign > (0 if before is None else large), -sign, sign) * s
            with using(name, DEVICES[name]):
                found = oriented(on(name, x), on(name, s), ORIENTED, None if before is None else on(name, before))
            assert found.shape == s.shape and torch.equal(found.cpu(), expected.to(found.dtype))


def test_the_largest_magnitude_is_served_by_max_scaling() -> None:
    x = torch.randn(64, 9).clamp(-1, 1) * 0.9
    x[torch.arange(64), torch.arange(64) % 9] = torch.randn(64).sign()
    s = maximum(x, ORIENTED, dim=0)
    sign = oriented(x, s, ORIENTED).sign()
    top = x.gather(1, x.abs().argmax(1, keepdim=True))
    assert torch.equal(sign, -top.sign())
    assert torch.equal(fake_quantize(x, sign * s, ORIENTED).gather(1, x.abs().argmax(1, keepdim=True)), top)


def test_a_sign_turns_only_when_it_clearly_pays() -> None:
    x = torch.tensor([[1.0, -1.0] + [0.1] * 7])
    s, before = torch.tensor([[1.0]]), torch.tensor([[1.0]])
    for excess, turns in ((1e-3, False), (0.02, True)):
        x[0, 0] = 1 + excess
        assert oriented(x, s, ORIENTED).item() == -1
        assert (oriented(x, s, ORIENTED, before).item() == -1) == turns
    flickers = [oriented(x * torch.tensor([1 + 1e-3 * (-1) ** i, *[1] * 8]), s, ORIENTED, before) for i in range(9)]
    assert len({f.item() for f in flickers}) == 1


@pytest.mark.parametrize("range", Range)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_octav_minimizes_what_it_models(range: Range, bits: int, signed: bool) -> None:
    format = IntFormat(bits, signed, range)
    for n in (9, 25, 576):
        x = rows(n, 60)
        s = octav(x, format, 0, 20, missing_code=True)
        if format.oriented:
            s = s * torch.where(x.amax(1, keepdim=True) > -x.amin(1, keepdim=True), -1.0, 1.0)
        found = expected_mse(x, s, format, 0, missing_code=True)
        grid = [expected_mse(x, s * f, format, 0, missing_code=True) for f in torch.linspace(0.5, 1.6, 150).tolist()]
        # Weights take the place of counts, and the model has jumps where an element leaves the interval.
        least = torch.stack(grid).amin(0)
        assert (found.sum() / least.sum()).item() < 1 + {2: 0.03, 3: 0.01, 4: 0.005, 8: 0.02}[bits]


@names
@pytest.mark.parametrize("dtype", DTYPES)
def test_backends_agree_on_missing_codes(name: str, dtype: torch.dtype) -> None:
    for shape in ((6, 40), (1, 17000)):  # rows that fit into registers, and longer ones
        x = (torch.randn(shape).exp() - 1).to(dtype)
        for format in (IntFormat(3), IntFormat(3, False), IntFormat(3, range=Range.ORIENTED)):
            with using("eager"):
                expected = octav(x.double(), format, 0, 30, missing_code=True)
            with using(name, DEVICES[name]):
                cold = octav(on(name, x), format, 0, 12, missing_code=True).cpu()
                warm = octav(on(name, x), format, 0, 8, on(name, 1.3 * expected.float()), missing_code=True).cpu()
            for found in (cold, warm):
                torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


@needs_compiler
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("range", [Range.TWOS_COMPLEMENT, Range.ORIENTED])
def test_the_largest_element_does_not_lie_above_itself(bits: int, range: Range) -> None:
    """The product of a magnitude and a weight is rounded; at many bits, s is often near the largest magnitude."""
    format = IntFormat(bits, range=range)
    for n in (64, 280):
        x = rows(n, 600).float()
        with using("eager"):
            expected = octav(x.double(), format, 0, 40, missing_code=True)
        with using("compiled"):
            torch.testing.assert_close(octav(x, format, 0, 40, missing_code=True).double(), expected, rtol=1e-5, atol=0)


@names
def test_scalars_of_zeros_are_zero_in_every_range(name: str) -> None:
    for dtype in (torch.float32, torch.float16, torch.float64):
        x = torch.zeros(3, 40, dtype=dtype)
        x[1, :7] = torch.linspace(-1, 2, 7)
        for format in (IntFormat(4), ORIENTED, IntFormat(4, range=Range.FULL), IntFormat(4, False)):
            with using(name, DEVICES[name]):
                s = octav(on(name, x), format, 0, missing_code=True).cpu().flatten()
            assert s[0] == s[2] == 0 and s[1] > 0


def test_without_it_two_complements_scalars_are_the_papers() -> None:
    x = torch.randn(8, 100)
    assert torch.equal(octav(x, 4, 0), octav(x, IntFormat(4), 0, missing_code=False))
    assert not torch.equal(octav(x, 4, 0), octav(x, 4, 0, missing_code=True))
    full = IntFormat(4, range=Range.FULL)
    assert torch.equal(octav(x, full, 0), octav(x, full, 0, missing_code=True))  # no code is missing


@pytest.mark.parametrize("range", Range)
@pytest.mark.parametrize("bits", [4, 8, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (3, 6))])
def test_refined_scalars_have_the_least_error(range: Range, bits: int) -> None:
    """Compare the mean error with that of a brute-force search, on rows of 64 or more elements.

    It is at most 0.1 % larger for normal numbers, and slightly more for skewed and heavy-tailed ones, where a second
    minimum may be far away.
    """
    format = IntFormat(bits, range=range)
    for n in (64, 576):
        x = rows(n, 90)
        s = octav(x, format, 0, missing_code=True, refine=256)
        s = oriented(x, s, format) if format.oriented else s
        pairs = zip(error(x, s, format).split(30), least_error(x, format).split(30), strict=True)
        normal, lopsided, heavy = (ours.sum() / least.sum() for ours, least in pairs)
        assert normal < 1.001 and lopsided < 1.02 and heavy < 1.02


@names
def test_backends_agree_on_refining(name: str) -> None:
    x = torch.randn(7, 50)
    for format in (IntFormat(4), IntFormat(4, False), ORIENTED, IntFormat(4, range=Range.FULL)):
        s = octav(x, format, 0)
        with using(name, DEVICES[name]):
            refined = octav(on(name, x), format, 0, refine=32).cpu()
        assert (error(x, refined, format) <= error(x, s, format) * (1 + 1e-6)).all() or format.oriented
        with using("eager"):
            reference = octav(x.double(), format, 0, refine=32)
        assert (error(x, refined, format) <= error(x, reference, format) * 1.001 + 1e-9).all()


@names
@pytest.mark.parametrize("exponent", [-100, 110])
def test_refining_does_not_depend_on_the_scale(name: str, exponent: int) -> None:
    """Squares of such values vanish or overflow in float32."""
    x = torch.randn(6, 9)
    with using(name, DEVICES[name]):
        expected = octav(on(name, x), 4, 0, refine=32)
        found = octav(on(name, x * 2.0**exponent), 4, 0, refine=32)
    assert torch.equal(found, expected * 2.0**exponent)


def test_nothing_to_refine() -> None:
    x = torch.stack([torch.zeros(9), torch.ones(9), torch.full((9,), 1e-30)])
    s = octav(x, 4, 0, refine=8)
    assert s[0] == 0 and torch.isfinite(s).all() and (s >= 0).all()
    with pytest.raises(ValueError, match=r"refine=-1: must be 0 or more candidates"):
        Octav(refine=-1)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "pact"])
@pytest.mark.parametrize("range", Range)
def test_every_method_in_every_range(name: str, range: Range) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(128, 4)
    )
    x = torch.randn(4, 3, 8, 8)
    quantize_model(model, 4, name, range=range, example=x)
    calibrate(model, [x])
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range_of(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    report = noise_report(model, [x])
    assert all(row.s > 0 and math.isfinite(row.mse) for row in report)
    for t in quantized_tensors(model):
        assert t.quantizer.format.range == range  # type: ignore[attr-defined]
        signs = {-1.0, 1.0} if t.quantizer.format.oriented else {1.0}
        assert {*t.quantizer.latest().sign().flatten().tolist()} <= signs


range_of = range  # since parameters of tests are named `range`


def test_an_oriented_network_is_frozen_saved_and_made_again(tmp_path: object) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Conv2d(8, 8, 3, groups=8))
    x = torch.randn(4, 3, 8, 8)
    quantize_model(model, 4, range="oriented", example=x)
    model.train()
    model(x)
    freeze(model, "averaged", [x, x + 0.1])
    model.eval()
    path = f"{tmp_path}/model.pt"
    save(model, path)
    again = load(path, nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Conv2d(8, 8, 3, groups=8)))
    assert torch.equal(model(x), again.eval()(x))
    weights = [t.quantizer for t in quantized_tensors(again) if t.tensor == "weight"]
    assert any((q.scalars < 0).any() for q in weights) and all((q.s >= 0).all() for q in weights)


def test_states_of_other_ranges_are_refused() -> None:
    oriented, plain = Quantizer(ORIENTED, Octav()), Quantizer(4, Octav())
    for quantizer, state in ((oriented, plain.state_dict()), (plain, oriented.state_dict())):
        with pytest.raises(RuntimeError, match="scalars of the oriented range cannot be used for another range"):
            quantizer.load_state_dict(state)


def test_an_average_of_signs_is_a_sign() -> None:
    q = Quantizer(ORIENTED, Octav())
    q.assign(torch.tensor(-2.0))
    assert (q.s, q.scalars) == (2.0, -2.0)
    q.orientation.fill_(-0.2)  # type: ignore[union-attr]
    assert q.scalars == -2.0
    with pytest.raises(ValueError, match="finite and not negative"):
        Quantizer(4, Octav()).assign(torch.tensor(-2.0))


def test_ranges_are_for_plain_integers() -> None:
    with pytest.raises(ValueError, match="clipping 'pact' always uses the full range"):
        clipping_method("pact").quantizer(ORIENTED, weight=False)
    with pytest.raises(ValueError, match="range='round': must be one of twos_complement, full, oriented"):
        quantize_model(nn.Sequential(nn.Linear(3, 3)), 4, range="round")


def test_the_sweep_takes_the_better_sign() -> None:
    x = rows(9)
    s = mse_sweep(x, ORIENTED, 0, 400, together=False)
    s = oriented(x, s, ORIENTED)
    assert (error(x, s, ORIENTED) / least_error(x, ORIENTED).clamp(min=1e-12)).median() < 1.1


def test_signs_do_not_flicker_in_training() -> None:
    """For depthwise rows of nine elements, few signs change in forty steps, and hardly any changes back."""
    model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.Hardswish(), nn.Conv2d(16, 16, 3, groups=16))
    x = torch.randn(32, 16, 8, 8)
    quantize_model(model, 4, range="oriented", first_last_bits=None, example=x[:2])
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    target, signs = torch.randn(32, 16, 4, 4), []
    for _ in range_of(40):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
        signs.append(torch.cat([t.quantizer.latest().sign().flatten() for t in quantized_tensors(model)]))
    turns = torch.stack(signs).diff(dim=0).ne(0).sum(0)
    assert turns.float().mean() < 0.5 and turns.max() <= 4
