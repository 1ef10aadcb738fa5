"""Formats compared with their definition, and a third-party format in one file, from the quantizer to the report."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qat_runner.cli import export, report, run
from qat_runner.exporting.integer import integers_of
from qat_runner.insertion import Rule, load, noise_report, quantize_model, quantized_tensors, save
from qat_runner.quant import (
    FORMATS,
    Format,
    IntAffineFormat,
    IntFormat,
    MidriseFormat,
    Octav,
    Quantizer,
    Range,
    as_format,
    fake_quantize,
    maximum,
    mse,
    octav,
)
from tests.plugins.my_package.codebook import Codebook

KINDS = [
    *(IntFormat(b, signed, range) for b in (2, 3, 4, 8) for signed in (True, False) for range in Range),
    *(MidriseFormat(b) for b in (2, 4, 8)),
    *(Codebook(b, signed) for b in (2, 4) for signed in (True, False)),
]


def nearest(x: torch.Tensor, s: float, format: Format) -> torch.Tensor:
    """Round x by comparing it with every level, in float64."""
    levels = torch.tensor(format.levels, dtype=torch.float64) * s
    return levels[(x.double()[..., None] - levels).abs().argmin(-1)]


@pytest.mark.parametrize("format", KINDS, ids=repr)
def test_values_are_the_nearest_levels(format: Format) -> None:
    for s in (0.7, 3.0, 1e-3):
        x = torch.randn(500) * s
        q = fake_quantize(x, s, format)
        error, least = (x - q).abs().double(), (x.double() - nearest(x, s, format)).abs()
        assert (error <= least * (1 + 1e-4) + 1e-6 * s).all()  # at a tie, both levels are right
        codes = format.encode(x, torch.tensor(s))
        assert torch.equal(codes, codes.round())
        torch.testing.assert_close(format.decode(codes, torch.tensor(s)), q, rtol=1e-6, atol=1e-7 * s)
        assert len(q.unique()) <= len(format.levels) <= 2**format.bits


@pytest.mark.parametrize("format", KINDS, ids=repr)
def test_levels_rise_and_their_noise_is_that_of_rounding_between_them(format: Format) -> None:
    levels = torch.tensor(format.levels, dtype=torch.float64)
    assert (levels.diff() > 0).all() and levels.abs().max() <= 1
    assert levels[-1] < 1 or levels.abs().max() == 1
    assert format.signed == bool((levels < 0).any())
    edges = torch.linspace(0, 1, 2001, dtype=torch.float64)
    gaps = levels[:-1, None] + levels.diff()[:, None] * edges
    x = gaps.flatten()  # the same number in each gap, evenly spread
    measured = mse(x, format.fake_quantize(x, torch.ones((), dtype=torch.float64))).item()
    assert measured == pytest.approx(format.rounding_noise, rel=1e-2)


@pytest.mark.parametrize("format", KINDS, ids=repr)
def test_zeros_and_what_is_not_finite(format: Format) -> None:
    x = torch.tensor([0.0, 1.0, -1.0, math.nan])
    assert fake_quantize(x[:3], 0.0, format).abs().max() == 0
    assert fake_quantize(x, 1.0, format).isnan().tolist() == [False, False, False, True]
    assert fake_quantize(torch.zeros(0, 3), 1.0, format).shape == (0, 3)
    assert fake_quantize(x[:3].bfloat16(), 1.0, format).dtype == torch.bfloat16


@given(st.integers(2, 16), st.booleans(), st.sampled_from(Range))
def test_integers(bits: int, signed: bool, range: Range) -> None:
    format = IntFormat(bits, signed, range)
    closed = range == "full" or (range == "oriented" and not signed)
    assert format.levels_per_scalar == 2 ** (bits - signed) - closed
    assert format.highest == 2 ** (bits - signed) - 1
    assert format.lowest == (0 if not signed else -format.levels_per_scalar)
    assert format.rounding_noise == pytest.approx(1 / 12 / format.levels_per_scalar**2)
    assert format.exported_type == f"{'' if signed else 'u'}int{4 if bits <= 4 else 8 if bits <= 8 else 16}"
    assert format.with_sign(not signed) == IntFormat(bits, not signed, range)
    assert format.oriented == (range == "oriented" and signed)


def test_what_is_no_format() -> None:
    for bits in (1, 17, 4.0, True, "4"):
        with pytest.raises(ValueError, match="bits="):
            IntFormat(bits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="levels without a zero"):
        MidriseFormat(4, signed=False)
    assert as_format(4) == IntFormat(4) and as_format(Codebook(3)) == Codebook(3)
    assert (IntFormat(4).name, IntFormat(8, False).name, Codebook(4).name) == ("int4", "uint8", "codebook4")


def test_formats_are_called_by_the_name_that_they_are_asked_for_by(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (IntAffineFormat(4, False).name, MidriseFormat(16).name) == ("uint_affine4", "midrise16")
    monkeypatch.setitem(FORMATS, "a_book", Codebook)
    with pytest.raises(ValueError, match="has numbers of format a_book4, whose codes no integer type holds"):
        integers_of(Quantizer(Codebook(4), Octav()))


@pytest.fixture
def codebook() -> Iterator[None]:
    FORMATS.register("codebook", Codebook)
    yield
    del FORMATS["codebook"]


def test_a_codebook_in_a_network(codebook: None, tmp_path: Path) -> None:
    x = torch.randn(8, 3, 8, 8)

    def network() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
        )

    model = quantize_model(network(), 4, format="codebook", rules=[Rule("5.*", format="int")], example=x)
    model(x).square().mean().backward()
    formats = {t.name: t.quantizer.format for t in quantized_tensors(model)}
    assert formats["2.weight"] == Codebook(4) and formats["2.input"] == Codebook(4, False)
    assert formats["5.weight"] == IntFormat(8)
    row = next(r for r in noise_report(model, [x]) if (r.layer, r.tensor) == ("2", "weight"))
    weight, s = model[2].weight.detach(), octav(model[2].weight, Codebook(4), dim=0)
    assert row.mse == pytest.approx(mse(weight, fake_quantize(weight, s, Codebook(4))).item(), rel=1e-5)
    save(model, tmp_path / "net.pt")
    assert torch.equal(load(tmp_path / "net.pt", network()).eval()(x), model.eval()(x))


def test_learned_scalars_are_for_plain_integers(codebook: None) -> None:
    with pytest.raises(ValueError, match="clipping 'lsq' is for plain integers, not for codebook4"):
        quantize_model(nn.Sequential(nn.Linear(4, 3)), 4, "lsq", format="codebook", first_last_bits=None)


def test_octav_of_a_codebook_is_near_its_best_scalar() -> None:
    x = torch.randn(20_000)
    found = mse(x, fake_quantize(x, octav(x, Codebook(4)), Codebook(4)))
    sweep = min(mse(x, fake_quantize(x, k / 50 * maximum(x, 4), Codebook(4))) for k in range(1, 51))
    assert found < 1.2 * sweep  # noise grows with the magnitude here, but the model assumes that it is constant


def test_a_codebook_from_the_command_to_the_page(
    codebook: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["model=resnet8", "dataset=digits", "format=codebook", "epochs=1", "limit_train_batches=2"]
    assert run.main([*command, "limit_val_batches=1", "run_dir=run", "device=cpu"]) == 0
    tensors = json.loads((tmp_path / "run" / "histograms.json").read_text())
    levels = next(t["levels"] for t in tensors if t["layer"] == "layer1.0.conv1" and t["tensor"] == "weight")
    assert levels == pytest.approx(Codebook(4).levels)
    assert report.main(["run"]) == 0 and (tmp_path / "run" / "report.html").is_file()
    capsys.readouterr()
    assert export.main(["run"]) == 2
    assert "numbers of format" in capsys.readouterr().err
