"""Tests of networks of integers against the quantized networks that they are made from."""

import copy
import errno
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune
from transformers.utils import ModelOutput

import qat_runner as qat
from qat_runner.config.tasks import Measure
from qat_runner.errors import ConfigError, RunError
from qat_runner.exporting import formats
from qat_runner.exporting.agreement import Figures, agrees, figures_of, require
from qat_runner.exporting.folding import fold_batchnorm
from qat_runner.exporting.formats import (
    DESCRIPTION,
    Signature,
    _pack,
    _unpack,
    read_program,
    read_safetensors,
    write_onnx,
    write_program,
    write_safetensors,
)
from qat_runner.exporting.integer import IntegerConv2d, IntegerLinear, StaticGrid, to_integers
from qat_runner.exporting.verify import OnnxFile, largest_difference, paired_standard_error
from qat_runner.insertion import calibrate, freeze, quantize_model
from qat_runner.quant import Quantizer, fake_quantize, octav
from tests.quant.oracles import same_but_for_ties


class Small(nn.Module):
    """Convolutions followed by BatchNorm, one of them depthwise with ReLU6, one whose output is used twice; a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.Conv2d(8, 8, 3, stride=2, groups=8), nn.BatchNorm2d(8)
        self.c, self.norm_c = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm_a(self.a(x)))
        x = F.relu6(self.norm_b(self.b(x)))
        y = self.c(x)
        return self.head((self.norm_c(y) + y).mean((2, 3)))


def frozen(bits: int = 4, negative: bool = False, **options: Any) -> tuple[nn.Module, Tensor]:
    """Return a frozen network in eval mode, after some passes in training mode, and a batch for it."""
    torch.manual_seed(0)
    model, data = Small(), [torch.randn(4, 3, 10, 10) for _ in range(3)]
    for norm in (model.norm_a, model.norm_b, model.norm_c):
        nn.init.uniform_(norm.weight, -1 if negative else 0.5, 1.5)
        nn.init.normal_(norm.bias)
    quantize_model(model, bits, example=data[0], **options)
    if not all(q.dynamic for q in model.modules() if isinstance(q, Quantizer)):
        calibrate(model, data)
    model.train()
    for x in data:
        model(x)
    return freeze(model, "averaged", data).eval(), data[0]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8, 9, 16])
def test_integers_compute_what_the_quantizers_did(bits: int) -> None:
    model, x = frozen(bits)
    expected = model(x)
    integers = to_integers(copy.deepcopy(model))
    assert torch.equal(integers(x), expected)
    assert not any(isinstance(m, Quantizer) for m in integers.modules())
    codes = integers.b.integer_weight
    assert codes.codes.dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert codes.codes.min() >= codes.format.lowest and codes.codes.max() <= codes.format.highest
    assert torch.equal(codes(), fake_quantize(model.b.weight, octav(model.b.weight, bits, dim=0), bits))


@pytest.mark.parametrize(
    "options",
    [
        {"clipping": "lsq"},
        {"clipping": "pact"},
        {"clipping": "percentile", "q": 99.0, "dynamic": False},
        {"conv_granularity": "tensor"},
        {"linear_granularity": "channel"},
        {"weight_bits": 32},
        {"activation_bits": 32},
        {"keep": ["b"]},
        {"range": "full"},
        {"range": "oriented"},
        {"range": "oriented", "clipping": "lsq"},
        {"weight_range": "oriented", "conv_granularity": "tensor"},
        {"format": "int_affine"},
    ],
)
def test_whatever_was_quantized_how(options: dict[str, Any]) -> None:
    model, x = frozen(4, **options)
    expected = model(x)
    integers = to_integers(model)
    assert torch.equal(integers(x), expected)
    fold_batchnorm(integers, x)
    same_but_for_ties(integers(x), expected)


@pytest.mark.parametrize("bits", [2, 4, 8, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (3, 7))])
def test_pact_has_its_own_grids_in_every_file(bits: int, tmp_path: Path) -> None:
    model, x = frozen(bits, negative=True, clipping="pact", alpha=2.5, first_last_bits=None)
    expected = model(x)
    integers = to_integers(model)
    assert torch.equal(integers(x), expected)
    weight, signed, unsigned = integers.b.integer_weight, integers.a.input_grid.format, integers.b.input_grid.format
    assert (
        weight.codes % 2 == 1
    ).all() and weight.codes.abs().max() == 2**bits - 1  # odd: DoReFa's weights have no zero
    assert weight.codes.dtype == (torch.int8 if bits < 8 else torch.int16)
    assert (signed.lowest, signed.highest) == (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    assert (unsigned.lowest, unsigned.highest) == (0, 2**bits - 1)
    assert integers.b.input_grid(torch.tensor([-1.0, 2.5, 99.0])).tolist() == pytest.approx([0, 2.5, 2.5])

    assert fold_batchnorm(integers, x) == []  # every code has a counterpart of the opposite sign
    expected = integers(x)
    write_safetensors(integers, tmp_path / "m.safetensors", {})
    state = read_safetensors(tmp_path / "m.safetensors")
    assert all(torch.equal(state[name], t) for name, t in integers.state_dict().items())
    about = json.loads((tmp_path / "m.json").read_text())["layers"]["b"]
    assert about["weight"]["bits"] == bits + 1 and about["input"]["highest"] == 2**bits - 1

    far = torch.cat([x, 100 * x])  # beyond both ends of the signed grid of the images
    write_onnx(integers, Signature((x,), ["images"], ["logits"]), tmp_path / "m.onnx")
    found = OnnxFile(tmp_path / "m.onnx", fused=False)([far])
    same_but_for_ties(found, integers(far))
    same_but_for_ties(found[:4], expected)


def test_a_tensor_of_zeros_stays_zero() -> None:
    model, x = frozen()
    with torch.no_grad():
        model.b.weight[:3] = 0
        model.head.weight.zero_()
    for layer in (model.b, model.head):
        q = layer.weight_quantizer
        q.freeze(q.scalars_of(layer.weight))
    model.head.input_quantizer.freeze(torch.tensor(0.0))
    expected = model(x)
    integers = to_integers(model)
    torch.testing.assert_close(integers(x), expected, rtol=0, atol=1e-30)
    assert torch.isfinite(integers.b.integer_weight.scale).all()


def test_what_has_no_integers() -> None:
    model = quantize_model(Small(), 4, example=torch.randn(2, 3, 10, 10))
    with pytest.raises(ValueError, match=r"head\.weight|a\.weight has no static clipping scalars"):
        to_integers(model)
    with pytest.raises(ValueError, match="nothing is quantized"):
        to_integers(Small())
    for how in ({"dynamic": False}, {"clipping": "lsq"}):  # nothing has reached these
        with pytest.raises(ValueError, match=r"^a\.weight has no clipping scalars: call calibrate"):
            to_integers(freeze(quantize_model(Small(), 4, **how)))


def test_of_eight_bits_the_highest_code_is_near_enough() -> None:
    model, x = frozen(8)
    integers = to_integers(model)
    with torch.no_grad():
        integers.norm_a.weight[0] = -1
    integers.a.integer_weight.codes[0, 0, 0, :2] = torch.tensor([-128, -127])
    before = integers(x)
    assert fold_batchnorm(integers, x) == []
    assert integers.a.integer_weight.codes[0, 0, 0, :2].tolist() == [127, 127]
    same_but_for_ties(integers(x), before)


@pytest.mark.parametrize("negative", [False, True])
def test_folding_keeps_integers_and_results(negative: bool) -> None:
    model, x = frozen(8, negative=negative)
    integers = to_integers(model)
    weights = {name: integers.get_submodule(name).integer_weight for name in ("a", "b")}
    signs = {"a": integers.norm_a.weight.sign(), "b": integers.norm_b.weight.sign()}
    before, codes = integers(x), {name: weight.codes.clone() for name, weight in weights.items()}
    assert fold_batchnorm(integers, x) == []
    kinds = [type(m) for m in (integers.norm_a, integers.norm_b, integers.norm_c)]
    assert kinds == [
        nn.Identity,
        nn.Identity,
        nn.BatchNorm2d,
    ]  # the output of the last convolution is also used elsewhere
    for name, weight in weights.items():
        rows = signs[name].reshape(-1, 1, 1, 1)
        turned = torch.where(rows < 0, -codes[name].clamp(min=-127), codes[name])
        assert torch.equal(weight.codes, turned)
    same_but_for_ties(integers(x), before, 0.2)  # nine codes have no counterpart of the opposite sign


def test_a_code_without_a_counterpart_keeps_its_batchnorm() -> None:
    model, x = frozen(4)
    integers = to_integers(model)
    with torch.no_grad():
        integers.norm_a.weight[:2] = torch.tensor([-1.0, 0.0])
        integers.norm_b.weight[0] = -1
    integers.b.integer_weight.codes[0, 0, 0, 0] = -8
    before = integers(x)
    assert fold_batchnorm(integers, x) == ["norm_b"]
    assert not integers.a.integer_weight.codes[1].any()
    same_but_for_ties(integers(x), before)


@given(st.lists(st.integers(-8, 7), max_size=9))
def test_packing_comes_back(codes: list[int]) -> None:
    t = torch.tensor(codes, dtype=torch.int8)
    packed = _pack(t)
    assert packed.dtype == torch.uint8 and len(packed) == (len(codes) + 1) // 2
    assert torch.equal(_unpack(packed, t.shape), t)
    if len(codes) >= 2:  # by hand
        assert int(packed[0]) == (codes[0] & 15) + 16 * (codes[1] & 15)


def test_an_oriented_scale_takes_the_sign_of_batchnorm() -> None:
    model, x = frozen(4, negative=True, range="oriented")
    before = model(x)
    integers = to_integers(model)
    codes = integers.b.integer_weight.codes.clone()
    scale, sign = integers.b.integer_weight.scale.clone(), integers.norm_b.weight.sign()
    assert (codes == -8).any() and (scale < 0).any() and (sign < 0).any()
    assert fold_batchnorm(integers, x) == []
    assert torch.equal(integers.b.integer_weight.codes, codes)
    assert torch.equal(integers.b.integer_weight.scale.sign(), scale.sign() * sign)
    same_but_for_ties(integers(x), before)


@pytest.mark.parametrize("range", ["twos_complement", pytest.param("full", marks=pytest.mark.slow), "oriented"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_signed_activations_in_every_range(bits: int, sign: int, range: str, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(6, 5)), sign * (torch.randn(40, 6).exp() - 1)
    quantize_model(model, bits, "max", range=range, first_last_bits=None, example=x)
    integers = to_integers(freeze(model, "averaged", [x]))
    assert bool(integers[0].input_grid.scale < 0) == (range == "oriented" and sign > 0)
    expected = integers(2 * x)  # some values are clipped on either side
    signature = Signature((x,), ["x"], ["y"])
    write_program(integers, signature, tmp_path / "m.pt2")
    assert torch.equal(read_program(tmp_path / "m.pt2")(2 * x)[0], expected)
    write_onnx(integers, signature, tmp_path / "m.onnx")
    for fused in (False, True) if bits < 8 else (False,):  # fused kernels of 8 bits saturate on some processors
        found = OnnxFile(tmp_path / "m.onnx", fused=fused)([2 * x])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "options"),
    [
        *((bits, {}) for bits in (4, 8)),
        *(pytest.param(bits, {}, marks=pytest.mark.slow) for bits in (3, 9)),
        (3, {"range": "oriented"}),
        *(pytest.param(b, {"range": r}, marks=pytest.mark.slow) for b, r in ((4, "full"), (8, "oriented"))),
        (4, {"format": "int_affine"}),
    ],
)
def test_the_three_files(bits: int, options: dict[str, str], tmp_path: Path) -> None:
    model, x = frozen(bits, **options)
    integers = to_integers(model)
    fold_batchnorm(integers, x)
    expected = integers(x)
    if options == {"range": "oriented"}:
        assert (integers.b.integer_weight.scale < 0).any()
    if options == {"format": "int_affine"}:
        assert integers.b.integer_weight.zero_point.unique().numel() > 1
    signature = Signature((x,), ["images"], ["logits"])

    write_program(integers, signature, tmp_path / "m.pt2")
    program = read_program(tmp_path / "m.pt2")
    torch.testing.assert_close(program(x)[0], expected)
    torch.testing.assert_close(program(torch.cat([x, x, x]))[0][:4], expected)  # any batch

    write_safetensors(integers, tmp_path / "m.safetensors", {"model": "small"})
    state = read_safetensors(tmp_path / "m.safetensors")
    assert state.keys() == integers.state_dict().keys()
    assert all(torch.equal(state[name], t) for name, t in integers.state_dict().items())
    about = json.loads((tmp_path / "m.json").read_text())
    assert about["layers"]["b"]["weight"]["bits"] == bits and about["layers"]["b"]["input"]["signed"] is False
    assert ("packed" in about["layers"]["b"]["weight"]) == (bits <= 4)
    assert set(about["full_precision"]) == {k for k in state if k.endswith("bias") or "norm" in k}

    write_onnx(integers, signature, tmp_path / "m.onnx")
    file = OnnxFile(tmp_path / "m.onnx", fused=False)
    same_but_for_ties(file([x]), expected)
    assert file([torch.cat([x, x, x])]).shape == (12, 5)
    assert file.seconds([x]) > 0


class Largest(nn.Module):
    """A layer whose inputs and weights all have their highest code: sums of two products need 16 bits and more."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        top = 2 ** (bits - 1) - 1
        self.linear = nn.Linear(64, 64, bias=False)
        nn.init.constant_(self.linear.weight, top / 2 ** (bits - 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.relu()).relu()


def largest_sums(bits: int, path: Path) -> Tensor:
    """Write the network with 8-bit activations and weights of `bits`; return its output for ones."""
    x = torch.ones(2, 64)
    model = quantize_model(Largest(bits), 8, "max", weight_bits=bits, first_last_bits=None, example=x)
    with torch.no_grad():
        model.linear.weight[0, 0] = -1.0  # the value of the lowest code
    integers = to_integers(freeze(model, "averaged", [x]))
    write_onnx(integers, Signature((x,), ["x"], ["y"]), path)
    return integers(x)


@pytest.mark.parametrize("bits", [7, 8])
def test_the_largest_sums_by_the_definition_of_the_file(bits: int, tmp_path: Path) -> None:
    expected = largest_sums(bits, tmp_path / "m.onnx")
    assert expected.max() > 62
    torch.testing.assert_close(OnnxFile(tmp_path / "m.onnx", fused=False)([torch.ones(2, 64)]), expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="no emulator of other processors here")
def test_fused_kernels_without_vnni_saturate_where_seven_bits_do_not(tmp_path: Path) -> None:
    """A file is judged by its definition because of such processors: AVX2 and nothing later, emulated here."""
    script = textwrap.dedent(
        """
        import sys, numpy, onnxruntime
        for path in sys.argv[1:]:
            for fused in (False, True):
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads, options.log_severity_level = 1, 3
                options.add_session_config_entry("session.disable_quant_qdq", str(int(not fused)))
                session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
                print(session.run(None, {"x": numpy.ones((2, 64), numpy.float32)})[0].max())
        """
    )
    files = [tmp_path / "8.onnx", tmp_path / "7.onnx"]
    expected = [largest_sums(bits, path).max().item() for bits, path in zip((8, 7), files, strict=True)]
    command = ["qemu-x86_64", "-cpu", "Haswell", sys.executable, "-c", script, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    eight, eight_fused, seven, seven_fused = map(float, done.stdout.split())
    assert [eight, seven, seven_fused] == pytest.approx([expected[0], expected[1], expected[1]], rel=0.01)
    assert eight_fused < 0.6 * expected[0]


def test_the_onnx_file_holds_true_integer_types(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model, x = frozen(4)
    write_onnx(to_integers(model), Signature((x,), ["images"], ["logits"]), tmp_path / "m.onnx")
    content = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(content, full_check=True)
    types = {
        t.name.removeprefix("network."): onnx.TensorProto.DataType.Name(t.data_type) for t in content.graph.initializer
    }
    assert (
        types["a.integer_weight.codes"] == types["head.integer_weight.codes"] == "INT8"
    )  # the first and the last layer
    assert types["b.integer_weight.codes"] == types["c.integer_weight.codes"] == "INT4"
    assert {types["zero_point_uint4"], types["zero_point_int8"]} == {"UINT4", "INT8"}
    nodes = [node.op_type for node in content.graph.node]
    assert nodes.count("QuantizeLinear") == 4 and nodes.count("DequantizeLinear") == 8
    assert not any(types.get(name) == "FLOAT" and name.endswith(".weight") and "norm" not in name for name in types)


class Returning(nn.Module):
    """A network that also returns the input of its BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
        nn.init.uniform_(self.norm.running_mean)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.head(self.norm(y)), y


def test_batchnorm_is_not_folded_into_what_is_returned(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 9, 9)
    model = freeze(quantize_model(Returning().eval(), 8, example=x), "averaged", [x])
    integers = qat.export(model, tmp_path / "m.safetensors", x)
    for ours, theirs in zip(integers(x), model(x), strict=True):
        torch.testing.assert_close(ours, theirs)


@dataclass
class Result:
    logits: Tensor
    features: Tensor


class InADataclass(Returning):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return Result(*super().forward(x))


def test_batchnorm_is_not_folded_into_what_a_dataclass_returns(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 9, 9)
    model = freeze(quantize_model(InADataclass().eval(), 8, example=x), "averaged", [x])
    integers = qat.export(model, tmp_path / "m.safetensors", x)
    for ours, theirs in zip(vars(integers(x)).values(), vars(model(x)).values(), strict=True):
        torch.testing.assert_close(ours, theirs)


class TwoNames(nn.Module):
    """A network whose layers have two names: their own one, and one by their position in a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        nn.init.uniform_(self.norm.running_mean), nn.init.uniform_(self.norm.weight)
        self.stem = nn.Sequential(self.conv, self.norm, nn.ReLU())
        self.head = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.stem(x))
        return out


def test_layers_of_two_names_are_folded_and_packed_once(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 9, 9)
    model = freeze(quantize_model(TwoNames().eval(), 4, first_last_bits=None, example=x), "averaged", [x])
    kept = qat.export(model, tmp_path / "kept.safetensors", x, fold=False)
    folded = qat.export(model, tmp_path / "m.safetensors", x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(x), kept(x), rtol=0, atol=0.1 * float(kept(x).detach().abs().max()))
    state = read_safetensors(tmp_path / "m.safetensors")
    assert torch.equal(state["stem.0.integer_weight.codes"], state["conv.integer_weight.codes"])
    assert not any("codes" in key for key in json.loads((tmp_path / "m.json").read_text())["full_precision"])


def test_a_network_of_one_layer(tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    model = freeze(quantize_model(nn.Linear(8, 5).eval(), 4, first_last_bits=4, example=x), "averaged", [x])
    integers = qat.export(model, tmp_path / "l.safetensors", x)
    state = read_safetensors(tmp_path / "l.safetensors")
    assert all(torch.equal(state[key], t) for key, t in integers.state_dict().items())


@pytest.mark.parametrize("size", [0.0, 1e-6])
def test_the_bias_of_a_dead_channel_is_kept_by_fused_kernels(size: float, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    x = torch.randn(2, 3, 9, 9)
    layers = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    with torch.no_grad():
        layers[2].weight[1].mul_(size)
        layers[2].bias[1] = 1.0
    model = freeze(quantize_model(layers, 8, example=x), "averaged", [x])
    expected = qat.export(model, tmp_path / "m.onnx", x)(x)
    fused = OnnxFile(tmp_path / "m.onnx", fused=True)((x,))
    torch.testing.assert_close(fused, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(8), nn.SyncBatchNorm(8)])
def test_batchnorm_is_folded_whatever_the_dimensions(norm: _BatchNorm, tmp_path: Path) -> None:
    x = torch.randn(3, 4, 16)
    assert norm.running_mean is not None
    nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.weight)
    layers = nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Conv1d(6, 8, 3), norm, nn.Conv1d(8, 2, 3))
    model = freeze(quantize_model(layers.eval(), 8, example=x), "averaged", [x])
    integers = qat.export(model, tmp_path / "m.safetensors", x)
    assert not any(isinstance(module, _BatchNorm) for module in integers.modules())
    same_but_for_ties(integers(x), model(x))


class Clamped(nn.Sequential):
    clamp: dict[str, float]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self[2](self[1](self[0](x).clamp(**self.clamp)))
        return out


@pytest.mark.parametrize("clamp", [{"max": 1.0}, {"min": -0.5}, {"min": -0.5, "max": 1.0}])
def test_a_clamp_before_four_bits_may_have_one_end(clamp: dict[str, float], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    x = torch.randn(2, 3, 9, 9)
    layers = Clamped(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3))
    layers.clamp = clamp
    model = freeze(quantize_model(layers, 4, example=x), "averaged", [x])
    integers = qat.export(model, tmp_path / "m.onnx", x)
    torch.testing.assert_close(OnnxFile(tmp_path / "m.onnx", fused=False)([x]), integers(x), rtol=0, atol=1e-5)


def test_a_network_of_another_dtype_is_written_in_float32(tmp_path: Path) -> None:
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).bfloat16()
    model = freeze(quantize_model(layers, 8, example=x), "averaged", [x])
    integers = qat.export(model, tmp_path / "m.safetensors", x)
    torch.testing.assert_close(integers(x.float()), model(x).float(), rtol=0.05, atol=0.05)
    assert model[0].weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="must be 1 names, one for each tensor of example"):
        qat.export(model, tmp_path / "m.safetensors", x, inputs=["a", "b"])


class Unused(nn.Module):
    """A network with a layer that is called, but whose output is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.aside = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        out: Tensor = self.used(x)
        return out


def test_an_output_that_is_not_used_is_in_no_onnx_file(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    x = torch.randn(6, 8)
    integers = qat.export(freeze(quantize_model(Unused(), 4, example=x), "averaged", [x]), tmp_path / "m.onnx", x)
    found = OnnxFile(tmp_path / "m.onnx", fused=False)([x])
    assert runtime and torch.allclose(found, integers(x), atol=1e-5)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("no tensors")
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        read_safetensors(tmp_path / "a.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ConfigError, match="not written by qat-export"):
        read_safetensors(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    "packed",
    [None, "", "[]", "{", "[" * 100_000, '{"y": [2]}', '{"x": [3]}', '{"x": [-2]}', '{"x": ["2"]}', '{"x": 2}'],
)
def test_codes_that_do_not_fit_what_is_said_of_them(tmp_path: Path, packed: str | None) -> None:
    from safetensors.torch import save_file

    about = {"format": DESCRIPTION} | ({} if packed is None else {"packed": packed})
    save_file({"x": torch.zeros(1, dtype=torch.uint8)}, tmp_path / "m.safetensors", metadata=about)
    with pytest.raises(ConfigError, match="the shapes of its packed codes do not fit"):
        read_safetensors(tmp_path / "m.safetensors")


class Unfollowable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else x


def test_a_network_that_cannot_be_exported_is_told_in_a_sentence(tmp_path: Path) -> None:
    x = torch.ones(2, 3)
    model = to_integers(freeze(quantize_model(Unfollowable(), 4, example=x), "averaged", [x]))
    for write, name in ((write_program, "m.pt2"), (write_onnx, "m.onnx")):
        with pytest.raises(RunError, match=f"{name}: PyTorch cannot export this network"):
            write(model, Signature((x,), ["x"], ["y"]), tmp_path / name)


def test_a_file_that_disagrees_is_refused() -> None:
    network, top1 = Figures(90.0), Measure("top1")
    require("model.onnx", Figures(89.6, 95.5, 3.0), network, top1)
    with pytest.raises(
        RunError, match=r"model\.onnx disagrees with the network: 94\.00 % of the predictions are the same"
    ):
        require("model.onnx", Figures(90.0, 94.0, 3.0), network, top1)
    assert agrees(figures_of({"accuracy": 90.0, "agreement": 100.0, "largest_difference": 1.0}), network, top1)
    for null in ("accuracy", "largest_difference"):  # null stands for a number that is not finite
        record = {"accuracy": 90.0, "agreement": 100.0, "largest_difference": 1.0, null: None}
        assert not agrees(figures_of(record), network, top1)
    for broken in (Figures(math.nan, 100.0), Figures(90.0, 100.0, math.inf)):
        with pytest.raises(RunError, match=r"model\.onnx disagrees with the network"):
            require("model.onnx", broken, network, top1)
    with pytest.raises(
        RunError, match=r"top1 89\.00 % instead of 90\.00 % \(at most 0\.5 percentage points lower allowed\)"
    ):
        require("model.onnx", Figures(89.0, 99.0, 3.0), network, top1)
    perplexity = Measure("perplexity", "", lower_is_better=True)
    for value in (80.0, 90.4):
        require("model.onnx", Figures(value, 99.0, 3.0), network, perplexity)
    with pytest.raises(RunError, match=r"perplexity 90\.50 instead of 90\.00 \(at most 0\.5 % worse allowed\)"):
        require("model.onnx", Figures(90.5, 99.0, 3.0), network, perplexity)


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([1.0, -math.inf], [1.25, -math.inf], 0.25),
        ([1.0, -math.inf], [1.0, 0.0], math.inf),
        ([1.0, math.nan], [1.0, 0.0], math.inf),
        ([1.0, math.nan], [1.0, math.nan], math.inf),
    ],
)
def test_the_largest_difference_of_logits(a: list[float], b: list[float], wanted: float) -> None:
    assert largest_difference(torch.tensor(a), torch.tensor(b)) == wanted


def test_integer_layers_are_what_their_classes_say() -> None:
    model, _ = frozen()
    integers = to_integers(model)
    assert type(integers.a) is IntegerConv2d and type(integers.head) is IntegerLinear
    assert isinstance(integers.a.input_grid, StaticGrid)
    assert "weight" not in dict(integers.a.named_parameters())


@pytest.mark.parametrize(("gained", "lost", "samples"), [(0, 0, 10), (3, 1, 50), (0, 7, 20), (40, 40, 100)])
def test_the_standard_error_of_a_paired_difference(gained: int, lost: int, samples: int) -> None:
    differences = torch.tensor([1.0] * gained + [-1.0] * lost + [0.0] * (samples - gained - lost), dtype=torch.float64)
    expected = 100 * differences.std(correction=0).item() / math.sqrt(samples)
    assert paired_standard_error(gained, lost, samples) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["net.onnx", "net.pt2", "net.safetensors"])
def test_a_network_out_of_a_loop_of_ones_own(name: str, tmp_path: Path) -> None:
    model, x = frozen(8)
    expected = model(x)
    integers = qat.export(model, tmp_path / name, x)
    same_but_for_ties(integers(x), expected)  # BatchNorm is folded
    assert torch.equal(model(x), expected)  # the model is unchanged
    if name.endswith("pt2"):
        (found,) = read_program(tmp_path / name)(x[:3])
        torch.testing.assert_close(found, integers(x[:3]))
    if name.endswith("onnx"):
        pytest.importorskip("onnxruntime")
        same_but_for_ties(OnnxFile(tmp_path / name, fused=False)([x]), integers(x))
    if name.endswith("safetensors"):
        assert json.loads((tmp_path / "net.json").read_text())["inputs"] == ["input"]


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_an_example_of_one_sample_stands_for_any_number(suffix: str, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4)), torch.randn(5, 4)
    freeze(quantize_model(model, 8, example=x).eval(), batches=[x])
    qat.export(model, tmp_path / f"net.{suffix}", x[:1])
    if suffix == "onnx":
        pytest.importorskip("onnxruntime")
        found = OnnxFile(tmp_path / "net.onnx", fused=False)([x])
    else:
        (found,) = read_program(tmp_path / "net.pt2")(x)
    torch.testing.assert_close(found, model(x))


@torch.no_grad()
def test_a_pruned_layer_is_written_as_it_is_used(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), torch.randn(3, 4)
    prune.random_unstructured(model[0], "weight", 0.5)
    freeze(quantize_model(model, 4, example=x).eval(), batches=[x])
    integers = qat.export(model, tmp_path / "net.pt2", x)
    assert torch.equal(integers(x), model(x)) and (integers[0].integer_weight.codes == 0).sum() >= 16
    assert not any("orig" in name or "mask" in name for name in integers.state_dict())
    assert prune.is_pruned(model)


class Answering(nn.Module):
    """A network that returns what the function `answer` makes of its output."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.layer, self.answer = nn.Linear(4, 3), answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.layer(x))


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        (lambda y: y, ["output"]),
        (lambda y: (y, y + 1), ["output_0", "output_1"]),
        (lambda y: {"logits": y, "cache": None}, ["logits"]),
        (lambda y: ModelOutput(logits=y, hidden=y + 1), ["logits", "hidden"]),
    ],
)
def test_names_of_what_a_network_returns(answer: Any, names: list[str], tmp_path: Path) -> None:
    x = torch.randn(2, 7, 4)
    model = quantize_model(Answering(answer), 8, example=x).eval()
    freeze(model, batches=[x])
    qat.export(model, tmp_path / "net.safetensors", x)
    assert json.loads((tmp_path / "net.json").read_text())["outputs"] == names
    qat.export(model, tmp_path / "net.pt2", x, longest=9)
    longer = torch.randn(3, 9, 4)
    found, expected = read_program(tmp_path / "net.pt2")(longer), model(longer)
    expected = [expected] if isinstance(expected, Tensor) else expected
    wanted = [expected[n] for n in names] if isinstance(expected, dict) else list(expected)
    assert len(found) == len(names) and all(map(torch.allclose, found, wanted))
    with pytest.raises(
        ValueError, match=r"the network returns a \w+ with tensors .*, so outputs=\['a', 'b', 'c'\] does"
    ):
        qat.export(model, tmp_path / "net.pt2", x, outputs=["a", "b", "c"])


@pytest.mark.parametrize("name", ["net.onnx", "net.pt2", "net.safetensors"])
def test_where_nothing_can_be_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = frozen(8)
    never: Any = "is looked at"  # the folder is checked before
    (tmp_path / "a_file").touch()
    (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*/no_folder'"):
        qat.export(model, tmp_path / "no_folder" / name, never)
    with pytest.raises(NotADirectoryError, match=r"'.*/a_file'"):
        qat.export(model, tmp_path / "a_file" / name, never)
    with pytest.raises(IsADirectoryError, match=name):
        qat.export(model, tmp_path / name, never)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)  # for root, it would always return True
        with pytest.raises(PermissionError, match="Permission denied"):
            qat.export(model, tmp_path / f"other_{name}", never)
    (tmp_path / name).rmdir()
    (tmp_path / name).write_text("of before")

    def fail(*args: Any, **how: Any) -> None:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise SafetensorError(f"I/O error: {full}") if name.endswith("safetensors") else full

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(formats, "save_file", fail)
    with pytest.raises(OSError, match="No space left on device") as caught:
        qat.export(model, tmp_path / name, x)
    assert caught.value.errno == errno.ENOSPC
    assert {path.name for path in tmp_path.iterdir()} == {"a_file", name}
    assert (tmp_path / name).read_text() == "of before"


def test_more_than_onnx_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ir = pytest.importorskip("onnx_ir")
    model, x = frozen(8)
    too_much = lambda model: SimpleNamespace(SerializeToString=lambda: bytes(-1))  # noqa: E731
    monkeypatch.setattr(ir, "to_proto", too_much)
    with pytest.raises(RunError, match=r"net\.onnx: cannot be written \(an ONNX file holds at most 2 GiB\)"):
        qat.export(model, tmp_path / "net.onnx", x)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    model, x = frozen(8)
    with pytest.raises(ValueError, match=r"net\.tflite: must end in one of \.onnx, \.pt2, \.safetensors"):
        qat.export(model, tmp_path / "net.tflite", x)
    dynamic = quantize_model(nn.Sequential(nn.Linear(4, 3)), 4, example=torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"0\.input has dynamic clipping scalars: call freeze"):
        qat.export(dynamic, tmp_path / "net.pt2", torch.randn(2, 4))
    with pytest.raises(ValueError, match="nothing is quantized"):
        qat.export(nn.Linear(4, 3), tmp_path / "net.pt2", torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"same number of samples in the first dimension of each tensor, not 2 and 3$"):
        qat.export(model, tmp_path / "net.pt2", (torch.randn(3, 4), torch.randn(2, 4)))
    forward = model.forward
    model.forward = lambda x: forward(x)  # type: ignore[method-assign]  # a closure runs the original also in a copy
    with pytest.raises(
        ValueError, match=r"a forward that was set on the instance of Small: .*\(del module\.forward\)$"
    ):
        qat.export(model, tmp_path / "net.pt2", x)
    model.forward = partial(type(model).forward, model)  # type: ignore[method-assign]  # this one follows the copy
    qat.export(model, tmp_path / "net.safetensors", x)
    for file in tmp_path.iterdir():
        file.unlink()
    assert not list(tmp_path.iterdir())
