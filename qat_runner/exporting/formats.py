"""Three ways to write a network of integers: ONNX, a program of torch.export, and safetensors with a description."""

import io
import json
import logging
import math
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qat_runner.description import fit
from qat_runner.errors import ConfigError, RunError, one_line
from qat_runner.exporting.integer import (
    OPSET,
    IntegerLayer,
    IntegerOwnForward,
    IntegerOwnWeight,
    IntegerWeight,
    StaticGrid,
)
from qat_runner.insertion.layers import full_precision_name, kind_of
from qat_runner.insertion.own_weights import layer_name
from qat_runner.quant import IntFormat
from qat_runner.runs.files import write_whole
from qat_runner.tasks import separate

DESCRIPTION = "qat_runner integers, version 1"
PACKED = "two codes a byte, low half first, in the order of the flattened tensor"
_Shapes = dict[str, list[Annotated[int, Field(ge=0)]]]
"""Name of a tensor whose codes are packed -> its shape."""


class Signature:
    """The inputs and outputs of a network in a file.

    Args:
        example: arguments of forward, each with the same number of samples, 2 or more; all sizes except the first are
            fixed.
        inputs, outputs: their names.
        longest: the largest size of the second dimension, which is then variable, and the same for all inputs; None: it
            is fixed.
    """

    def __init__(
        self, example: Sequence[Tensor], inputs: Sequence[str], outputs: Sequence[str], longest: int | None = None
    ) -> None:
        self.example, self.inputs, self.outputs = tuple(example), list(inputs), list(outputs)
        self.longest = longest

    @property
    def dynamic_shapes(self) -> tuple[tuple[dict[int, Any], ...]]:
        """The dimensions whose sizes are variable, for PyTorch's exporters."""
        sizes = [torch.export.Dim("batch")]
        if self.longest is not None:
            sizes.append(torch.export.Dim("tokens", max=self.longest))
        each = tuple(dict(enumerate(sizes[: t.ndim])) for t in self.example)
        return (each,)  # one group: forward of _Outputs takes *inputs


def several_samples(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return inputs with two samples if they have one, since PyTorch's exporters take a size of 1 for a constant.

    Raises:
        ValueError: the inputs have different numbers of samples.
    """
    samples = sorted({len(t) for t in given if t.ndim})
    if len(samples) > 1:
        raise ValueError(
            f"example: must have the same number of samples in the first dimension of each tensor, "
            f"not {' and '.join(map(str, samples))}"
        )
    return given if samples != [1] else tuple(torch.cat([t, t]) if t.ndim else t for t in given)


class _Outputs(nn.Module):
    """A network that returns a tuple of tensors, as files do."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return separate(self.network(*inputs), self.names)


def write_program(model: nn.Module, signature: Signature, path: Path) -> None:
    """Write a program of torch.export: `torch.export.load(path).module()` runs it, with PyTorch alone.

    Raises:
        RunError: torch.export cannot export the network.
        OSError: the file cannot be written; an existing file is unchanged.
    """
    network, shapes = _Outputs(model, signature.outputs).eval(), signature.dynamic_shapes
    content = io.BytesIO()  # PyTorch's file writer ends the process if the disk is full
    with torch.no_grad(), _exporting(path), _experts_in_batches(network):
        program = torch.export.export(network, signature.example, dynamic_shapes=shapes, strict=False)
        torch.export.save(program, content)
    write_whole(path, lambda file: file.write(content.getbuffer()))


def read_program(path: Path) -> nn.Module:
    """Read what `write_program` wrote: a module with the same inputs, which returns a tuple of outputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch 2.11 warns of its own reader
        return torch.export.load(path).module()


def write_onnx(
    model: nn.Module, signature: Signature, path: Path, about: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Write ONNX with QuantizeLinear and DequantizeLinear of true integer types, int4 and uint4 up to 4 bits.

    Args:
        model: a network of integers.
        signature: its inputs and outputs.
        path: the file to write.
        about: metadata of the file about the network and its input; values that are not text are stored as JSON.

    Raises:
        ConfigError: the packages that ONNX needs are not installed.
        RunError: torch.onnx cannot export the network, or it is too large for ONNX.
        OSError: the file cannot be written; an existing file is unchanged.
    """
    try:
        import onnx_ir as ir
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"ONNX needs {error.name}: pip install 'qat_runner[export]'; --formats torch safetensors does not need it"
        ) from error
    network = _Outputs(model, signature.outputs).eval()
    for layer in network.modules():
        if isinstance(layer, IntegerLayer):
            layer.measure_bias()
    with torch.no_grad(), _exporting(path), _experts_in_batches(network):
        program = torch.onnx.export(
            network,
            signature.example,
            dynamo=True,
            opset_version=OPSET,
            input_names=signature.inputs,
            output_names=signature.outputs,
            dynamic_shapes=signature.dynamic_shapes,
            verbose=False,
        )
    assert program is not None
    _check_integers(program.model.graph, network, signature, path)
    for node in program.model.graph:
        node.metadata_props.clear()  # source locations, which take more bytes than a small network's weights
    modules = network.named_modules(remove_duplicate=False)  # any of its names may have been recorded
    stored = {f"{name}.codes": m.format.exported_type for name, m in modules if isinstance(m, IntegerWeight)}
    _give_types(program.model.graph, stored)
    said = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    program.model.metadata_props.update(said)
    try:
        content = ir.to_proto(program.model).SerializeToString()
    except Exception as error:  # protobuf's, which must not be imported just to name its class
        raise RunError(f"{path.name}: cannot be written (an ONNX file holds at most 2 GiB)") from error
    write_whole(path, lambda file: file.write(content))


def _check_integers(graph: Any, network: nn.Module, signature: Signature, path: Path) -> None:
    """Check that torch.onnx recorded integers.

    If its first method fails, it uses a second one, which records plain arithmetic.

    Raises:
        RunError: it did not; the message is that of the first method, if that fails.
    """
    wanted = any(isinstance(module, IntegerWeight | StaticGrid) for module in network.modules())
    if not wanted or any(node.op_type == "DequantizeLinear" for node in graph):
        return
    with torch.no_grad(), _exporting(path):
        torch.export.export(network, signature.example, dynamic_shapes=signature.dynamic_shapes, strict=False)
    raise RunError(f"{path.name}: PyTorch recorded this network without its integers")


def _give_types(graph: Any, stored: Mapping[str, str | None]) -> None:
    """Store weights in ONNX's smallest types, and give each quantizing node its zero point, which carries the type.

    Args:
        graph: a graph of onnx_ir.
        stored: name of an initializer that holds codes -> its integer type.
    """
    import onnx_ir as ir

    for name, kind in stored.items():
        value, wanted = graph.initializers.get(name), ir.DataType[str(kind).upper()]
        if value is not None and value.dtype != wanted:  # None: the output of its layer is not used
            value.const_value = ir.tensor(value.const_value.numpy().astype(wanted.numpy()), name=name)
            value.dtype = wanted
    for node in list(graph):
        if node.op_type == "QuantizeLinear":
            dtype, codes = node.outputs[0].dtype, [node.attributes.pop(end).value for end in ("lowest", "highest")]
            if dtype.bitwidth == 4:
                _replace_clip(graph, node)
            whole, zero = IntFormat(dtype.bitwidth, dtype.is_signed()), node.attributes["zero_point"].value[0]
            if codes != [whole.lowest - zero, whole.highest - zero]:  # the type alone would allow more codes
                _limit_to(graph, node, codes)
            _zero_point(graph, node, dtype)
        elif node.op_type == "DequantizeLinear":
            _zero_point(graph, node, node.inputs[0].dtype)


def _zero_point(graph: Any, node: Any, dtype: Any) -> None:
    """Give a quantizing node its third input: zero points of its integer type, as many as it has scales."""
    shape, zeros = list(node.inputs[1].shape), list(node.attributes.pop("zero_point").value)
    name = "_".join(["zero_point", dtype.name.lower(), *map(str, shape), *(map(str, zeros) if any(zeros) else ())])
    if name not in graph.initializers:
        numbers = torch.tensor(zeros, dtype=torch.float32).expand(math.prod(shape)).reshape(shape)
        _constant(graph, name, numbers.numpy().astype(dtype.numpy()))
    node.resize_inputs(3)
    node.replace_input_with(2, graph.initializers[name])


def _replace_clip(graph: Any, node: Any) -> None:
    """Replace a Clip (ReLU6) before a 4-bit QuantizeLinear by Max and Min.

    onnxruntime 1.32 fails when it tries to fuse the two.
    """
    clip = node.inputs[0].producer()
    if clip is not None and clip.op_type == "Clip":
        x, low, high = (*clip.inputs, None, None)[:3]
        node.replace_input_with(0, _limit(graph, node, x, low, high))


def _limit_to(graph: Any, node: Any, codes: Sequence[int]) -> None:
    """Limit the input of a QuantizeLinear to the values between its lowest and its highest code."""
    x, scale = node.inputs[:2]
    step = scale.const_value.numpy()
    values = [(step * code).astype(step.dtype) for code in (codes if step > 0 else codes[::-1])]
    ends = [
        _constant(graph, f"{node.outputs[0].name}_{end}", value)
        for end, value in zip(("lowest", "highest"), values, strict=True)
    ]
    node.replace_input_with(0, _limit(graph, node, x, *ends))


def _limit(graph: Any, node: Any, x: Any, low: Any, high: Any) -> Any:
    """Insert min(max(x, low), high) before a node, without a bound that is None, and return the result."""
    import onnx_ir as ir

    for operator, end in (("Max", low), ("Min", high)):
        if end is None:
            continue
        limit = ir.node(operator, [x, end])
        limit.outputs[0].type, limit.outputs[0].shape = x.type, x.shape
        graph.insert_before(node, limit)
        x = limit.outputs[0]
    return x


def _constant(graph: Any, name: str, numbers: Any) -> Any:
    import onnx_ir as ir

    tensor = ir.tensor(numbers, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(numbers.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def write_safetensors(model: nn.Module, path: Path, about: Mapping[str, Any]) -> None:
    """Write the state of a network of integers, with codes of up to 4 bits packed, and a .json that describes it.

    Args:
        model: a network of integers.
        path: ends in .safetensors; the description has the same name with .json.
        about: further entries of the description: the network, its input.
    """
    layers = {
        name: _describe(f"{name}." if name else "", layer)
        for name, layer in model.named_modules(remove_duplicate=False)  # all names, as in the state dict
        if isinstance(layer, IntegerLayer)
    }
    packed = {w["codes"]: w["shape"] for d in layers.values() if (w := d.get("weight")) and "packed" in w}
    state = {
        name: _pack(t) if name in packed else t.detach().contiguous().clone() for name, t in model.state_dict().items()
    }
    described = {part["scale"] for d in layers.values() for part in d.values() if isinstance(part, dict)}
    described |= {w["codes"] for d in layers.values() if (w := d.get("weight"))}
    parts = [part for d in layers.values() for part in d.values() if isinstance(part, dict)]
    zero_points = {part["zero_point"] for part in parts if "zero_point" in part}
    described |= zero_points
    value = "code * scale; codes are two's complement if signed"
    value = (
        f"(code - zero_point) * scale; without a zero_point: {value}"
        if zero_points
        else f"{value}; all zero points are 0"
    )
    description = {
        "format": DESCRIPTION,
        "value": value,
        **about,
        "layers": layers,
        "full_precision": sorted(state.keys() - described),
    }
    unsigned = [w["codes"] for d in layers.values() if (w := d.get("weight")) and "packed" in w and not w["signed"]]
    metadata = {"format": DESCRIPTION, "packed": json.dumps(packed)}
    metadata |= {"unsigned": json.dumps(unsigned)} if unsigned else {}
    save_file(state, path, metadata=metadata)
    path.with_suffix(".json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    shutil.copymode(path.with_suffix(".json"), path)  # safetensors makes files readable only for their owner


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the state dict that `write_safetensors` wrote, with codes unpacked, in the integer dtypes of the network.

    Raises:
        ConfigError: the file is not one that it wrote, or its metadata does not fit its codes.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is not a dict
    except Exception as error:  # a parser may raise anything on a file of another kind
        raise ConfigError(f"{path}: not a readable safetensors file ({' '.join(str(error).split())})") from error
    if metadata.get("format") != DESCRIPTION:
        raise ConfigError(f"{path}: not written by qat-export")
    try:
        unsigned = fit(list[str], json.loads(metadata.get("unsigned", "[]")))
        for name, shape in fit(_Shapes, json.loads(metadata.get("packed", ""))).items():
            state[name] = _unpacked(state.get(name), shape, name not in unsigned)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: the shapes of its packed codes do not fit ({one_line(error)})") from error
    return state


def _unpacked(packed: Tensor | None, shape: Sequence[int], signed: bool) -> Tensor:
    count = math.prod(shape)
    if packed is None or packed.dtype != torch.uint8 or packed.ndim != 1 or len(packed) != (count + 1) // 2:
        raise ValueError(f"expected {count} codes of four bits")
    return _unpack(packed, shape, signed)


def _describe(prefix: str, layer: nn.Module) -> dict[str, Any]:
    """Return what the tensors of an integer layer mean; their names begin with `prefix`."""
    described: dict[str, Any] = {"kind": getattr(layer, "kind_name", None) or kind_of(layer)}
    if isinstance(layer, IntegerOwnForward):
        described["class"] = full_precision_name(layer)
    for child, module in layer.named_children():
        if isinstance(module, IntegerWeight):
            described["weight"] = {
                "codes": f"{prefix}{child}.codes",
                "scale": f"{prefix}{child}.scale",
                "shape": list(module.codes.shape),
                "axis": module.axis if module.scale.ndim else None,
                **_grid(module),
                **_zero(f"{prefix}{child}", module),
                **({"packed": PACKED} if module.format.storage_bits == 4 else {}),
                **(_place(prefix.removesuffix("."), layer) if isinstance(layer, IntegerOwnWeight) else {}),
            }
        elif isinstance(module, StaticGrid):
            described[child.removesuffix("_grid")] = {
                "scale": f"{prefix}{child}.scale",
                **_grid(module),
                **_zero(f"{prefix}{child}", module),
            }
    return described


def _place(name: str, layer: IntegerOwnWeight) -> dict[str, Any]:
    """Return the parameter whose rows (columns if transposed) the codes are, in the order of its first dimensions."""
    return {
        "parameter": name.removesuffix(layer_name(layer.parameter)) + layer.parameter,
        "parameter_shape": list(layer.weight.shape),
        "transposed": layer.turned,
    }


def _zero(name: str, module: IntegerWeight | StaticGrid) -> dict[str, str]:
    return {} if module.zero_point is None else {"zero_point": f"{name}.zero_point"}


def _grid(module: IntegerWeight | StaticGrid) -> dict[str, Any]:
    format = module.format
    signed = format.lowest < 0
    return {"bits": format.code_bits, "signed": signed, "lowest": format.lowest, "highest": format.highest}


def _pack(codes: Tensor) -> Tensor:
    """Pack n codes of up to 4 bits, any shape, int8 or uint8, into bytes [ceil(n / 2)], uint8."""
    flat = codes.flatten()
    halves = nn.functional.pad(flat, (0, flat.numel() % 2)).to(torch.uint8).bitwise_and(0xF).reshape(-1, 2)
    return halves[:, 0] | (halves[:, 1] << 4)


def _unpack(packed: Tensor, shape: Sequence[int], signed: bool = True) -> Tensor:
    """Undo `_pack`."""
    halves = torch.stack([packed & 0xF, packed >> 4], dim=1).flatten()[: torch.Size(shape).numel()]
    if signed:
        halves = halves.to(torch.int8)
        halves = torch.where(halves > 7, halves - 16, halves)
    return halves.reshape(tuple(shape))


@contextmanager
def _experts_in_batches(network: nn.Module) -> Iterator[None]:
    """Context manager under which transformers computes mixtures of experts in the one way that can be exported."""
    able: list[Any] = [m for m in network.modules() if getattr(m, "_can_set_experts_implementation", lambda: False)()]
    before = [m.get_experts_implementation() for m in able]
    try:
        for module in able:
            module.set_experts_implementation("batched_mm")
        yield
    finally:
        for module, implementation in zip(able, before, strict=True):
            module.set_experts_implementation(implementation)


@contextmanager
def _exporting(path: Path) -> Iterator[None]:
    """Context manager under which PyTorch's exporters log nothing about their internals, and fail with one sentence."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # whole graphs of networks that fail
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # an exporter may raise anything on a network that it cannot export
        cause = error.__cause__ or error
        raise RunError(
            f"{path.name}: PyTorch cannot export this network ({type(cause).__name__}: {one_line(cause)})"
        ) from error
    finally:
        logging.disable(before)
