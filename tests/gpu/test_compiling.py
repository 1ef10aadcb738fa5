"""A quantized network trains as one graph of torch.compile as it does without torch.compile.

The tests use float64, where the two differ only by rounding errors. In float32, the last bits of a tensor can change
which code a value is rounded to.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_runner.insertion import calibrate, quantize_model, quantized_tensors
from qat_runner.quant.methods import MseSweep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*TensorFloat32:UserWarning"),
]
METHODS: dict[str, dict[str, Any]] = {
    "octav": {},
    "static": {"dynamic": False},
    "lsq": {"clipping": "lsq"},
    "pact": {"clipping": "pact"},
    "max": {"clipping": "max"},
    "percentile": {"clipping": "percentile"},
    "mse_sweep": {"clipping": MseSweep(points=5)},
    "mph": {"gradient": "mph"},
    "ewgs": {"gradient": "ewgs"},
    "trust": {"gradient": "trust"},
    "oriented": {"range": "oriented"},
    "affine": {"activation_format": "int_affine"},
}


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch.compiler.reset()


def network(device: torch.device, x: Tensor, **how: Any) -> nn.Module:
    """Return a quantized network that already has scalars, as after the first step of a run."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 5)).to(device)
    quantize_model(model, 8, example=x, **how)
    calibrate(model, [x])
    return model.train()


def losses(model: nn.Module, called: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    """Return the losses of four steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    found = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(called(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return found


@pytest.mark.parametrize("method", METHODS)
def test_the_same_but_for_rounding(device: torch.device, method: str) -> None:
    x, y = torch.randn(16, 3, 8, 8, device=device), torch.randint(0, 5, (16,), device=device)
    plain = network(device, x, **METHODS[method]).double()
    graph = deepcopy(plain)
    expected = losses(plain, plain, x.double(), y)
    found = losses(graph, torch.compile(graph, fullgraph=True), x.double(), y)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)
    assert found[-1] < found[0]
    torch.testing.assert_close(dict(graph.named_parameters()), dict(plain.named_parameters()), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(dict(graph.named_buffers()), dict(plain.named_buffers()), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_kernels_of_the_device(device: torch.device, dtype: torch.dtype) -> None:
    x, y = torch.randn(16, 3, 8, 8, device=device), torch.randint(0, 5, (16,), device=device)
    plain = network(device, x)
    graph = deepcopy(plain)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        expected = losses(plain, plain, x, y)
        found = losses(graph, torch.compile(graph, fullgraph=True), x, y)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)
    scalars = [quantized_tensors(model)[0].quantizer.s for model in (graph, plain)]
    torch.testing.assert_close(*scalars, rtol=5e-3, atol=0)
