"""Tests of experts, and of other weights that a module owns itself, as integers."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat_runner as qat
from qat_runner.exporting.formats import read_safetensors
from qat_runner.exporting.integer import to_integers
from qat_runner.exporting.verify import OnnxFile
from qat_runner.insertion import freeze, quantize_model
from qat_runner.quant import Quantizer
from tests.insertion.test_own_weights import IDS, WAYS, X, decoder, mixture


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"linear_granularity": "tensor"},
        {"weight_format": "int_affine"},
        {"weight_range": "oriented"},
        {"weight_bits": 32},
        {"activation_bits": 32},
    ],
)
@pytest.mark.parametrize("name", WAYS)
def test_integers_compute_what_the_quantizers_did(name: str, options: dict[str, Any]) -> None:
    model = freeze(mixture(name, **options), batches=[X]).eval()
    expected = model(X)
    integers = to_integers(copy.deepcopy(model))
    assert torch.equal(integers(X), expected)
    assert not any(isinstance(m, Quantizer) for m in integers.modules())
    assert ("0.weights" in integers.state_dict()) is ("weight_bits" in options)


class Routed(nn.Module):
    """A network that sends each token to the expert with the largest router output."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(8, 3), nn.Linear(8, 4)
        self.experts = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        out: Tensor = self.head(torch.bmm(x[:, None], self.experts[chosen])[:, 0])
        return out


@pytest.mark.parametrize("name", ["net.onnx", "net.pt2", "net.safetensors"])
def test_files(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = quantize_model(Routed(), first_last_bits=None, linear_granularity="channel", example=X)
    freeze(model, batches=[X]).eval()
    path = tmp_path / name
    integers = qat.export(model, path, X)
    assert torch.equal(integers(X), model(X))
    if name.endswith("onnx"):
        assert torch.allclose(OnnxFile(path, fused=False)([X]), model(X), atol=1e-5)
    elif name.endswith("pt2"):
        (out,) = torch.export.load(path).module()(X[:5])
        assert torch.equal(out, model(X[:5]))
    else:
        state = read_safetensors(path)
        weight = json.loads(path.with_suffix(".json").read_text())["layers"]["experts_product"]["weight"]
        assert (weight["parameter"], weight["parameter_shape"], weight["transposed"]) == ("experts", [3, 8, 8], True)
        rows = state[weight["codes"]] * state[weight["scale"]][:, None]
        used = model.experts_product.used().weight
        assert weight["shape"] == [24, 8] and torch.equal(rows.view(3, 8, 8).mT, used)


@pytest.mark.slow
def test_a_mixture_of_transformers(tmp_path: Path) -> None:
    model = freeze(quantize_model(decoder("GptOss", "grouped_mm"), example=IDS), batches=[IDS])
    model.config.use_cache = False
    path = tmp_path / "net.onnx"
    qat.export(model, path, IDS, inputs=["input_ids"], outputs=["last_hidden_state"])
    torch.testing.assert_close(OnnxFile(path, fused=False)([IDS]), model(IDS).last_hidden_state)
    assert model.config._experts_implementation == "grouped_mm"
