"""Training steps of a quantized network learn, do not wait for the device, and can be captured in a CUDA graph."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from qat_runner.insertion import calibrate, quantize_model, quantized_tensors
from qat_runner.insertion.insert import weights_together


@contextmanager
def no_waits() -> Iterator[None]:
    """Make every wait for the device an error. PyTorch warns once about this mode itself, which is ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def training(device: torch.device, together: bool = True) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return a network and a step that returns the loss; weights are solved and rounded together, or one by one."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 3, 8, 8, device=device), torch.randint(0, 5, (16,), device=device)
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    model = quantize_model(nn.Sequential(*layers).to(device), 4, example=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    weights = weights_together(model)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with weights.quantized() if together else nullcontext():
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
        optimizer.step()
        return loss.detach()

    return model, step


@pytest.mark.parametrize("together", [True, False])
def test_steps_learn(device: torch.device, together: bool) -> None:
    model, step = training(device, together)
    losses = [step().item() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert all(t.quantizer.batches == 20 for t in quantized_tensors(model))


@pytest.mark.gpu
@pytest.mark.parametrize("together", [True, False])
def test_a_step_does_not_wait(cuda: torch.device, together: bool) -> None:
    _, step = training(cuda, together)
    for _ in range(3):
        step()
    with no_waits():
        step()
        step()


@pytest.mark.gpu
def test_a_network_that_came_from_the_cpu_does_not_wait(cuda: torch.device) -> None:
    training(cuda)[1]()  # libraries and kernels are loaded
    model, _ = training(torch.device("cpu"))
    calibrate(model, [torch.randn(4, 3, 8, 8)])
    for t in quantized_tensors(model):
        t.quantizer.eval_mode = "last"
    model.eval().to(cuda)
    x = torch.randn(16, 3, 8, 8, device=cuda)
    with no_waits():
        model(x)
        model.train()(x)


@pytest.mark.gpu
def test_a_step_in_a_cuda_graph(cuda: torch.device) -> None:
    """During capture, each weight is solved separately, by kernels that must have been loaded before."""
    model, step = training(cuda, together=False)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        first, *_ = [step().item() for _ in range(3)]
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for _ in range(17):
        graph.replay()
    assert loss.item() < first
    assert all(t.quantizer.batches == 20 for t in quantized_tensors(model))
