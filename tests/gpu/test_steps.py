"""Training steps of a quantized network: they learn, do not wait for the device, and fit into a CUDA graph."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qat_runner.insertion import calibrate, quantize_model, quantized_tensors


def training(device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A network, and a step that returns its loss."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 3, 8, 8, device=device), torch.randint(0, 5, (16,), device=device)
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    model = quantize_model(nn.Sequential(*layers).to(device), 4, example=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step() -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return model, step


def test_steps_learn(device: torch.device) -> None:
    model, step = training(device)
    losses = [step().item() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert all(t.quantizer.batches == 20 for t in quantized_tensors(model))


@pytest.mark.gpu
def test_a_step_does_not_wait(cuda: torch.device) -> None:
    _, step = training(cuda)
    for _ in range(3):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_network_that_came_from_the_cpu_does_not_wait(cuda: torch.device) -> None:
    training(cuda)[1]()  # libraries and kernels are loaded
    model, _ = training(torch.device("cpu"))
    calibrate(model, [torch.randn(4, 3, 8, 8)])
    for t in quantized_tensors(model):
        t.quantizer.eval_mode = "last"
    model.eval().to(cuda)
    x = torch.randn(16, 3, 8, 8, device=cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x)
        model.train()(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_step_in_a_cuda_graph(cuda: torch.device) -> None:
    model, step = training(cuda)
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
