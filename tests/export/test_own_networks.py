"""Tests of exporting users' own networks, among them unusual ones."""

from pathlib import Path

import pytest
import torch
import transformers.quantizers  # noqa: F401  # logs warnings when first imported, as exports do if there is transformers
from torch import Tensor, nn
from torch.nn.utils import prune

import qat_runner as qat
from qat_runner.errors import RunError
from qat_runner.exporting.verify import OnnxFile


def quantized(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> nn.Module:
    qat.quantize(model, 4, example=example, first_last_bits=None)
    return qat.freeze(model.eval(), "averaged", [example])


class Fixed(nn.Module):
    """A network that needs the number of samples as an integer, which exporters do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x.shape[0], int)
        out: Tensor = self.layer(x)
        return out


class Deciding(Fixed):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out if out.sum() > 0 else -out


@pytest.mark.parametrize("network", [Fixed, Deciding])
def test_a_file_without_integers_is_refused(
    network: type[Fixed], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    x = torch.randn(4, 8)
    with pytest.raises(RunError, match=r"^m\.onnx: PyTorch cannot export this network"):
        qat.export(quantized(network(), x), tmp_path / "m.onnx", x)
    assert not (tmp_path / "m.onnx").exists()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("dims", [1, 2])
def test_a_convolution_of_one_sample(dims: int, tmp_path: Path) -> None:
    """Its bias, which ONNX adds in a separate node at 4 bits, then belongs to the first dimension."""

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = (nn.Conv1d, nn.Conv2d)[dims - 1](5, 5, 3, padding=1)
            nn.init.uniform_(self.layer.bias, 1, 3)  # type: ignore[arg-type]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x.transpose(0, -1)).transpose(0, -1)
            return out

    x = torch.randn(5, *[5] * dims)
    model = quantized(Alone(), x)
    qat.export(model, tmp_path / "m.onnx", x)
    torch.testing.assert_close(OnnxFile(tmp_path / "m.onnx", fused=False)([x]), model(x))


def test_an_input_of_a_number_a_sample_beside_texts_of_any_length(tmp_path: Path) -> None:
    class Weighed(Fixed):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
            out: Tensor = self.layer(x) * weight[:, None, None]
            return out

    example = torch.randn(2, 5, 8), torch.rand(2)
    model = quantized(Weighed(), example)
    qat.export(model, tmp_path / "m.pt2", example, longest=12)
    other = torch.randn(3, 7, 8), torch.rand(3)
    (found,) = torch.export.load(tmp_path / "m.pt2").module()(*other)
    torch.testing.assert_close(found, model(*other))


def test_a_pruned_network_in_training_is_exported(tmp_path: Path) -> None:
    x = torch.randn(16, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    prune.l1_unstructured(model[0], "weight", 0.5)
    qat.quantize(model, 4, clipping="lsq", example=x)
    qat.calibrate(model, [x])
    model(x).sum().backward()
    qat.export(model.eval(), tmp_path / "m.pt2", x)
    (found,) = torch.export.load(tmp_path / "m.pt2").module()(x)
    torch.testing.assert_close(found, model(x))


class Named(Fixed):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, factor: Tensor | None = None) -> Tensor:
        out: Tensor = self.layer(x if mask is None else x * mask)
        return out if factor is None else out * factor


def test_an_example_by_name(tmp_path: Path) -> None:
    x, mask = torch.randn(4, 8), torch.ones(4, 1)
    model = qat.quantize(Named(), 4, example={"mask": mask, "x": x}, first_last_bits=None)
    qat.freeze(model.eval(), "averaged", [{"mask": mask, "x": x}])
    qat.export(model, tmp_path / "m.onnx", {"mask": mask, "x": x})
    session = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "m.onnx")
    (found,) = session.run(None, {"x": x.numpy(), "mask": mask.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x, mask))
    for wrong in ({"x": x, "factor": mask}, {"mask": mask}):
        with pytest.raises((TypeError, ValueError), match=r"example: must be the first arguments|missing .*'x'"):
            qat.export(model, tmp_path / "m.pt2", wrong)
    for other in ({"x": x, "mask": None}, (x, None)):
        with pytest.raises(ValueError, match=r"^example: must consist of tensors, not of NoneType$"):
            qat.export(model, tmp_path / "m.pt2", other)  # type: ignore[arg-type]
