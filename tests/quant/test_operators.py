"""The operations as PyTorch operators, as seen by compilers, exporters, transforms and dispatch modes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qat_runner import quantize_model
from qat_runner.quant import IntAffineFormat, IntFormat, Range, fake_quantize, octav
from qat_runner.quant.kernels import operators
from qat_runner.quant.kernels.cost import cost_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # old compilers use deprecated features
FORMATS = [IntFormat(4), IntFormat(3, False), IntFormat(4, True, Range.FULL), IntAffineFormat(4)]
LAYOUTS = {
    "dense": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(0, 2, 1, 3),
    "gaps": lambda x: x[:, :, :, ::2],
}


def scalars(format: IntFormat | IntAffineFormat) -> Tensor:
    return torch.tensor([-0.4, 1.2]) if format.parts == 2 else torch.tensor(1.2)


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pytorch_finds_nothing_wrong(format: IntFormat | IntAffineFormat, layout: str) -> None:
    """Run PyTorch's checks of schemas, fake tensors, strides and the registration of gradients."""
    x, s = LAYOUTS[layout](torch.randn(3, 4, 5, 6)), scalars(format)
    words = operators._words(format)
    for gradient in ("ste", "mad"):
        torch.library.opcheck(
            torch.ops.qat_runner.fake_quantize, (x.clone().requires_grad_(), s, *words, gradient), test_utils=CHECKS
        )
    torch.library.opcheck(
        torch.ops.qat_runner.fake_quantize_backward, (torch.randn_like(x), x, s, *words, "mad"), test_utils=CHECKS
    )
    for dims in ([0, 1, 2, 3], [1, 2, 3]):
        noise = cost_of(format, False, None).noise
        if format.parts == 2:
            torch.library.opcheck(torch.ops.qat_runner.octav_interval, (x, None, noise, dims, 5, 1e-4))
        else:
            torch.library.opcheck(torch.ops.qat_runner.octav, (x, None, None, noise, format.signed, 1.0, dims, 5, 1e-4))


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def test_transforms_of_functions() -> None:
    x, s = torch.randn(5, 4, 6), torch.rand(5) + 0.5
    one = torch.stack([fake_quantize(row, v, 4) for row, v in zip(x, s, strict=True)])
    assert torch.equal(torch.func.vmap(lambda row, v: fake_quantize(row, v, 4))(x, s), one)
    affine = IntAffineFormat(4)
    for shape in ((), (4, 1), (2,)):  # shapes of a bound; the last one has the shape of an interval
        ends = torch.stack([-torch.rand(5, *shape), torch.rand(5, *shape)], 1)
        rows = x[..., :2] if shape == (2,) else x
        one = torch.stack([fake_quantize(row, v, affine) for row, v in zip(rows, ends, strict=True)])
        assert torch.equal(torch.func.vmap(lambda row, v: fake_quantize(row, v, affine))(rows, ends), one)
    per_row = torch.rand(4, 1) + 0.5
    many = torch.func.vmap(lambda row: fake_quantize(row, per_row, 4))(x)
    assert torch.equal(many, torch.stack([fake_quantize(row, per_row, 4) for row in x]))

    def loss(x: Tensor) -> Tensor:
        return fake_quantize(x, torch.tensor(0.8), 4, "pwl").square().sum()

    y = x.clone().requires_grad_()
    loss(y).backward()
    assert torch.equal(torch.func.grad(loss)(x), y.grad)
    for format, scalars in ((IntFormat(4), s), (affine, torch.stack([-s, 2 * s], 1))):
        for gradient in ("pwl", "mad"):

            def of_one(row: Tensor, v: Tensor, format: Any = format, gradient: str = gradient) -> Tensor:
                return fake_quantize(row, v, format, gradient).square().sum()

            found = torch.func.vmap(torch.func.grad(of_one))(x, scalars)
            each = [torch.func.grad(of_one)(row, v) for row, v in zip(x, scalars, strict=True)]
            assert torch.equal(found, torch.stack(each))
    with pytest.raises(RuntimeError, match="double backward"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(x)


def test_export_keeps_operations_whole() -> None:
    model = quantize_model(nn.Sequential(nn.Linear(8, 4)), 4, example=torch.randn(2, 8)).eval()
    exported = torch.export.export(model, (torch.randn(3, 8),))
    graphs = [m.graph for m in exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    called = [str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"]
    assert sum("qat_runner.octav" in name for name in called) == 2
    assert sum("qat_runner.fake_quantize" in name for name in called) == 2
    x = torch.randn(3, 8)
    torch.testing.assert_close(exported.module()(x), model(x))


class Counting(TorchDispatchMode):
    """Collects the names of dispatched operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_them_and_autocast_lets_them_be() -> None:
    x = torch.randn(6, 8, requires_grad=True)
    with Counting() as seen, torch.autocast("cpu", torch.bfloat16):
        s = octav(x, 4, check=False)
        q = fake_quantize(x, s, 4)
        q.sum().backward()
    assert q.dtype == torch.float32
    assert torch.equal(q, fake_quantize(x, octav(x, 4), 4))
    ours = [name for name in seen.calls if name.startswith("qat_runner")]
    assert ours == [f"qat_runner.{name}.default" for name in ("octav", "fake_quantize", "fake_quantize_backward")]
